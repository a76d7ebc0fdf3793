"""The demo's page: what is asked on top, the answers below, side by side."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image
from vlmlab.contracts.terminal import tell
from vlmlab.demo import drawing
from vlmlab.demo.answers import Asked, Card, answer
from vlmlab.demo.runs import Example, Shown
from vlmlab.loading import read_image

if TYPE_CHECKING:
    import gradio as gr

STYLE = Path(__file__).with_name("page.css")


@dataclass
class Demo:
    """What the page's events call; it knows nothing of gradio.

    Attributes:
        runs: one or two.
        tests: pictures of the first run's benchmarks.
        settings: of every answer.
        seed: of sampling.
        why_none: why there are no test pictures, in one sentence.
    """

    runs: Sequence[Shown]
    tests: Sequence[Example]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    why_none: str = ""

    def pictures(self, test: int | None, right: str | None, wrong: str | None) -> str:
        """The pictures that a choice of test picture and two uploaded files come to, as HTML."""
        chosen = None if test is None else self.tests[test]
        names, found, problems = [], [], []
        for file, kind in ((right, "right"), (wrong, "wrong")):
            own, name = self._own(chosen, kind) if file is None else ((), f"uploaded: {Path(file).name}")
            try:
                own = own if file is None else (self._read(file),)
            except UserError as error:
                problems.append(str(error))
            names.append(name)
            found.append(own)
        answers = chosen.answers if chosen is not None and right is None else ()
        return drawing.pictures(found[0], found[1], (names[0], names[1]), answers, " ".join(problems))

    @staticmethod
    def _own(chosen: Example | None, kind: str) -> tuple[tuple[Image, ...], str]:
        """The pictures of a test sample, or those of another, and where they are from."""
        if chosen is None:
            return (), ""
        return (chosen.right, chosen.name) if kind == "right" else (chosen.wrong, "of another test question")

    def question(self, test: int | None) -> str:
        """The question of a test picture."""
        return "" if test is None else self.tests[test].question

    def ask(
        self, test: int | None, right: str | None, wrong: str | None, question: str, layer: str
    ) -> Iterator[tuple[str, list[Card]]]:
        """The answers as HTML and as cards, again at every piece of one; a mistake is one sentence there."""
        try:
            asked = self._asked(test, right, wrong, question)
            for cards in answer(self.runs, asked, self.settings, self.seed):
                yield drawing.cards(cards, layer), cards
        except UserError as error:
            yield drawing.problem(str(error)), []
        except Exception:  # a fault of ours: the page goes on
            tell(traceback.format_exc().rstrip())
            yield drawing.problem("Something failed here; the terminal of vlmlab demo has the details."), []

    def _asked(self, test: int | None, right: str | None, wrong: str | None, question: str) -> Asked:
        chosen = None if test is None else self.tests[test]
        if not question.strip():
            raise UserError("Which question? Write one into the field above.")
        asked = Asked(
            question.strip(),
            self._own(chosen, "right")[0] if right is None else (right,),
            self._own(chosen, "wrong")[0] if wrong is None else (wrong,),
        )
        for file in (right, wrong):
            if file is not None:
                self._read(file)  # refused once and not in every card
        if not asked.right:
            raise UserError("Which picture? Upload one, or choose a test picture.")
        return asked

    def _read(self, file: str) -> Image:
        """An uploaded file, by the rules and limits that training's own files are read with."""
        try:
            return read_image(file, self.runs[0].model)
        except UserError as error:
            said = str(error).replace(f"{Path(file).parent}{os.sep}", "")
            raise UserError(f"This file cannot be used as a picture. {said}") from None


def build(demo: Demo) -> gr.Blocks:
    """The page."""
    import gradio as gr

    names = " and ".join(run.name for run in demo.runs)
    with gr.Blocks(analytics_enabled=False, title=f"vlmlab demo: {names}") as page:
        gr.HTML(f"<h1>vlmlab demo</h1>{drawing.table_of_runs(demo.runs)}")
        if demo.why_none:
            gr.HTML(drawing.problem(demo.why_none))
        choices = [(one.label, k) for k, one in enumerate(demo.tests)]
        first = 0 if choices else None
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                test = gr.Dropdown(choices, value=first, label="Test picture with its question", visible=bool(choices))
                question = gr.Textbox(demo.question(first), label="Question", elem_id="question", lines=1, max_lines=4)
                with gr.Row():
                    right = gr.File(label="Upload the right picture", height=160, elem_id="right-file")
                    wrong = gr.File(label="Upload a wrong picture", height=160, elem_id="wrong-file")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=2, min_width=320):
                pictures = gr.HTML(demo.pictures(first, None, None), elem_id="pictures")
        layer = gr.Dropdown([drawing.MEAN], value=drawing.MEAN, label="Attention of which layer?", visible=False)
        answers = gr.HTML(elem_id="answers")
        cards = gr.State([])
        _wire(demo, page, test, question, right, wrong, ask, pictures, layer, answers, cards)
    return page


def _wire(
    demo: Demo, page: Any, test: Any, question: Any, right: Any, wrong: Any, ask: Any, pictures: Any, layer: Any,
    answers: Any, cards: Any,
) -> None:  # fmt: skip
    """What happens when something is chosen, uploaded or asked."""
    import gradio as gr

    def layers(found: list[Card], chosen: str) -> Any:
        offered = drawing.layers(found)
        value = chosen if chosen in offered else drawing.MEAN
        return gr.Dropdown(offered, value=value, visible=len(offered) > 1)

    given = [test, right, wrong]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    test.change(demo.question, test, question, **quiet)
    gr.on([test.change, right.change, wrong.change], demo.pictures, given, pictures, **quiet)
    gr.on([ask.click, question.submit], demo.ask, [*given, question, layer], [answers, cards], **quiet).then(
        layers, [cards, layer], layer, **quiet
    )
    layer.input(lambda found, chosen: drawing.cards(found, chosen), [cards, layer], answers, **quiet)

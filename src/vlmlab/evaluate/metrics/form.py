"""Whether an answer has the form that was asked for, whatever it says: a box, a phrase, a sentence or several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.values import Count
from vlmlab.data.boxes import Boxes, BoxText, box_text
from vlmlab.evaluate.metrics.rows import Row

FORM = "answer_form"


def form(text: str, boxes: BoxText) -> tuple[bool, int]:
    """What an answer looks like.

    Returns:
        Whether a box is in it, and its words beside boxes: 0 none, 1 some without the end of a sentence, 2 one
        sentence, 3 several.
    """
    words = boxes.without(text).strip()
    ends = len(re.findall(r"[.!?](?=\s|$)", words))
    known = re.search(r"\w", words) is not None
    return boxes.read(text) is not None, (1 + min(ends, 2)) if known else 0


class AnswerForm:
    """``answer_form``: share of answers with the form of their reference, also per kind as ``answer_form/kind/<kind>``.

    What MiniGPT-v2's identifiers decide (arXiv 2310.09478) and what tuning on instructions teaches first. ``compute``
    adds ``answer_form/count``. There is no floor: a form is told by words, and wrong images do not change it.

    Args:
        boxes: the convention in which boxes are written, that of the data.
        bins: its steps of a side; null: as its paper has.

    Raises:
        UserError: an unknown convention.
    """

    of_answers = FORM

    def __init__(self, boxes: Boxes = "qwen_vl", bins: Count | None = None) -> None:
        self._text = box_text(boxes, bins)
        self._right: dict[str, list[float]] = {"": []}

    def score(self, prediction: Row) -> float:
        """1.0 where the answer has the form of its first reference; UserError if there is none."""
        if not prediction.references:
            raise UserError(f"Question {prediction.id} of {prediction.benchmark} has no answer; give it one.")
        return float(form(prediction.prediction, self._text) == form(prediction.references[0], self._text))

    def update(self, prediction: Row) -> None:
        """Add one answer."""
        for suffix in ("", f"/kind/{prediction.kind}") if prediction.kind else ("",):
            self._right.setdefault(suffix, []).append(self.score(prediction))

    def predicted(self) -> dict[str, float]:
        """The share, overall and per kind; UserError if there was no question."""
        if not self._right[""]:
            raise UserError("AnswerForm has no question to score; raise budget.eval_limit or check the benchmark.")
        return {f"{FORM}{suffix}": fmean(values) for suffix, values in sorted(self._right.items())}

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the number of questions."""
        return self.predicted() | {f"{FORM}/count": float(len(self._right[""]))}

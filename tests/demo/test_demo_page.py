"""What is behind the page of ``vlmlab demo``, without gradio: cards, maps, pictures, growing answers, the address."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image as Pillow

from vlmlab.contracts.errors import UserError
from vlmlab.demo import drawing
from vlmlab.demo.answers import Card, pieces
from vlmlab.demo.page import Demo
from vlmlab.demo.runs import Example, Shown, examples, rows
from vlmlab.demo.serve import POLICY, kept_here, listen
from vlmlab.evaluate.attention import CROSS, SELF, Attention

RED, BLUE = (np.full((32, 48, 3), colour, dtype=np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
TEST = Example("world_test #3", "Which <b>colour</b>?", ("red",), (RED,), (BLUE,))
rng = np.random.default_rng(0)


def seen(grid: tuple[int, int] | None = (2, 3), kind: str = SELF) -> Attention:
    weights = rng.random((4, 2, 1, 6)).astype(np.float32) / 12  # layers, tokens, images, visual tokens
    return Attention(["re", "</s>"], [0.5, 0.25], [RED], grid, {kind: weights})


class Model:
    """Says the colour of the picture and its own name."""

    def __init__(self, **config: Any) -> None:
        self.config = OmegaConf.create(config)
        self.model = SimpleNamespace(encoder=object())

    def generate(self, image: Any, question: str, stream: Any = None, **settings: Any) -> str:
        said = "red" if np.array_equal(image[0], RED) else "blue"
        for piece in said if stream else ():
            stream(piece)
        return said

    def attention(self, image: Any, question: str, answer: str, system: str = "") -> Attention:
        if question == "long":
            raise UserError("the answer has too many tokens.")
        return seen()


def demo(*names: str, **changes: Any) -> Demo:
    runs: Any = [Shown("AB"[k], name, Model(seed=k), {}) for k, name in enumerate(names)]
    return replace(Demo(runs, [TEST]), **changes)


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_a_map_is_one_pixel_a_visual_token_and_as_dense_as_its_weight() -> None:
    weights = np.array([[0.0, 0.05], [0.1, 0.2]], dtype=np.float32)
    png = Pillow.open(io.BytesIO(base64.b64decode(drawing.heat_png(weights, 0.2))))
    assert png.mode == "RGBA" and png.size == (2, 2)
    alpha = np.asarray(png)[..., 3]
    assert alpha[0, 0] == 0 and alpha[1, 1] == int(drawing.DENSEST * 255) and (np.diff(alpha.flatten()) > 0).all()
    assert not np.asarray(Pillow.open(io.BytesIO(base64.b64decode(drawing.heat_png(weights * 0, 0.0)))))[..., 3].any()


@pytest.mark.parametrize("layer", [drawing.MEAN, "2", "9"])
def test_a_layer_is_chosen_or_the_mean(layer: str) -> None:
    weights = rng.random((4, 2, 1, 6)).astype(np.float32)
    found, said = drawing.layer_of(weights, layer, "layer")
    np.testing.assert_array_equal(found, weights[1] if layer == "2" else weights.mean(0))
    assert said.startswith("layer 2 of 4" if layer == "2" else "mean over 4 layers")
    assert ("there is no layer 9" in said) == (layer == "9")


def test_cards_name_run_picture_and_scale_and_escape_every_text() -> None:
    told = seen()
    cards = [Card("A", "<i>a</i>", False, "red<", "done", told), Card("A", "<i>a</i>", True, "blue", "done", told)]
    page = drawing.cards(cards)
    assert "&lt;i&gt;a&lt;/i&gt;" in page and "red&lt;" in page and "<i>a" not in page
    right, wrong = page.index("the right picture"), page.index("another (wrong) picture")
    assert right < wrong and page.count("<section") == 2
    weights = told.maps[SELF].mean(0)  # (T, I, M)
    assert f"{weights.mean(0).sum():.0%} of the attention is on the picture" in page
    assert f">{weights[1].max():.2g}</b>" in page and "re <small>0.50</small>" in page and "&lt;/s&gt;" in page
    assert page.count('class="heat') == 2 * 3 and "2 by 3 visual tokens" in page  # both tokens and their mean
    assert drawing.layers(cards) == [drawing.MEAN, "1", "2", "3", "4"] and drawing.layers([]) == [drawing.MEAN]


def test_tokens_without_a_place_are_bars_and_a_composition_without_attention_has_a_sentence() -> None:
    page = drawing.cards([Card("A", "a", False, "red", "done", seen(None, CROSS))])
    assert "have no place in the picture" in page and page.count("<rect") == 6 * 3 and 'class="heat' not in page
    assert "over nothing else" in page
    none = Attention(["red"], [0.5], [RED], (2, 3), {}, "There is no map.")
    page = drawing.cards([Card("A", "a", False, "red", "done", none)])
    assert "There is no map." in page and "0.50" in page and "fieldset" not in page


def test_large_pictures_are_sent_small() -> None:
    assert drawing.preview(np.zeros((3000, 1000, 3), np.uint8)).shape == (512, 171, 3)
    assert drawing.preview(RED) is RED


def test_the_page_names_nothing_elsewhere() -> None:
    folder = Path(drawing.__file__).parent
    for file in [*folder.glob("*.jinja"), *folder.glob("*.css")]:
        assert not re.search(r"https?:|//[a-z]|@import|url\(", file.read_text()), file


# -- the runs ----------------------------------------------------------------------------------------------------------


def test_the_table_shows_where_two_runs_differ() -> None:
    parts = [{"_target_": "vlmlab.connector.pool.PoolConnector", "side": side, "act": "gelu"} for side in (2, 4)]
    configs = [{"connector": part, "seed": 0, "recipe": {"stages": {"one": {}, "two": {}}}} for part in parts]
    metrics = {"world_test/vqa_accuracy": 0.5, "world_test/vqa_accuracy/shuffled": 0.25}
    runs: Any = [Shown("AB"[k], "x", Model(**config), {"metrics": metrics}) for k, config in enumerate(configs)]
    found = {row.key: row for row in rows(runs)}
    assert found["connector"].values == ["PoolConnector (side=2)", "PoolConnector (side=4)"]
    assert {key for key, row in found.items() if row.differs} == {"connector"}
    assert found["stages"].values[0] == "one → two" and "encoder" not in found
    assert found["world_test, vqa_accuracy"].values[0] == "0.500 (shuffled 0.250)"
    assert "PoolConnector (side=2)" in drawing.table_of_runs(runs)
    assert rows(runs[:1])[0].values == ["PoolConnector"]


def test_examples_come_with_those_of_the_shuffled_baseline() -> None:
    source = {"_target_": "vlmlab.data.world.sources.WorldQuestions", "split": "test", "size": 40, "multi_turn": False}
    config = OmegaConf.create({"data": {"benchmarks": {"a": {"source": source}}}})
    found, why = examples(config, 5)
    assert len(found) == 5 and why == "" and found[0].name == "a #0" and found[-1].name == "a #32"
    assert all(not np.array_equal(one.right[0], one.wrong[0]) and one.answers[0] for one in found)
    assert replace(found[0], question="x" * 200).label.endswith("…")
    found, why = examples(OmegaConf.create({"data": {}}), 5)
    assert not found and "upload one" in why


# -- asking ------------------------------------------------------------------------------------------------------------


def test_every_run_answers_for_both_pictures_piece_by_piece() -> None:
    states = [cards for _, cards in demo("a", "b").ask(0, None, None, "What?", drawing.MEAN)]
    assert [(c.letter, c.wrong) for c in states[0]] == [("A", False), ("B", False), ("A", True), ("B", True)]
    assert [c.text for c in states[-1]] == ["red", "red", "blue", "blue"]
    assert all(c.state == "done" and c.attention is not None for c in states[-1])
    texts = [cards[0].text for cards in states]
    assert texts[:4] == ["", "r", "re", "red"] and states[0][0].state == "waiting"


def test_mistakes_are_one_sentence_in_the_page(tmp_path: Path) -> None:
    text, bomb, good = tmp_path / "a.png", tmp_path / "bomb.png", tmp_path / "good.png"
    text.write_text("no picture")
    Pillow.fromarray(BLUE).save(good)
    head = bytearray(good.read_bytes())
    head[16:24] = (60_000).to_bytes(4, "big") * 2

    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    bomb.write_bytes(bytes(head))
    page = demo("a")
    for file in (text, bomb):
        for html in (page.pictures(0, str(file), None), [*page.ask(0, str(file), None, "?", drawing.MEAN)][-1][0]):
            assert html.count('class="problem"') == 1 and "cannot be used as a picture" in html, html
            assert str(tmp_path) not in html and file.name in html
    assert "Which question" in [*page.ask(0, None, None, " ", drawing.MEAN)][-1][0]
    assert "Which picture" in [*page.ask(None, None, str(good), "?", drawing.MEAN)][-1][0]
    cards = [*page.ask(0, str(good), None, "long", drawing.MEAN)][-1][1]
    assert [c.note for c in cards] == ["the answer has too many tokens."] * 2


def test_an_uploaded_picture_takes_the_place_of_the_test_picture(tmp_path: Path) -> None:
    Pillow.fromarray(BLUE).save(tmp_path / "mine.png")
    html = demo("a").pictures(0, str(tmp_path / "mine.png"), None)
    assert "uploaded: mine.png" in html and "Right answer" not in html and "of another test question" in html
    html = demo("a").pictures(0, None, None)
    assert "world_test #3" in html and "<b>red</b>" in html
    assert demo("a").question(0) == TEST.question and demo("a").question(None) == ""


def test_a_fault_of_ours_leaves_the_page_alive(capsys: pytest.CaptureFixture[str]) -> None:
    page = demo("a")
    page.runs[0].model.attention = lambda *a, **k: 1 / 0  # type: ignore[method-assign]
    assert "the terminal" in [*page.ask(0, None, None, "?", drawing.MEAN)][-1][0]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_thread_whose_pieces_nobody_takes_ends_at_the_next() -> None:
    made: list[int] = []

    def ask(stream: Any) -> str:
        for k in range(10_000):
            made.append(k)
            stream(str(k))
            time.sleep(0.002)
        return "all"

    answer: Iterator[tuple[str, bool]] = pieces(ask)
    assert next(answer) == ("0", False)
    answer.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(made) < 10_000
    with pytest.raises(UserError, match="not possible"):
        list(pieces(lambda stream: (_ for _ in ()).throw(UserError("not possible"))))


# -- the server --------------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_or_not_there_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port={port} cannot be listened at .*; give another port"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"host=192\.0\.2\.1 port=0 cannot be listened at"):  # of no machine (RFC 5737)
        listen("192.0.2.1", 0)


def test_every_answer_forbids_the_browser_to_load_from_elsewhere() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(kept_here(app)({"type": "http"}, None, send))  # type: ignore[arg-type]
    assert sent[0]["headers"] == [(b"a", b"b"), (b"content-security-policy", POLICY.encode())]
    assert "http" not in POLICY and "default-src 'self'" in POLICY

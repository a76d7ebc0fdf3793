"""``vlmlab inspect``: the page shows what the collator gives the model, names what is wrong, and runs no caption."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from tests import tiny
from tests.test_conf import composed

from vlmlab.cli.verb import arguments
from vlmlab.contracts.errors import UserError
from vlmlab.data.asking import APART
from vlmlab.engine.restore import module_class
from vlmlab.inspect.inspection import Inspection, inspect_stage, print_report, visible, write_page
from vlmlab.lm.tokenizer import CHATML
from vlmlab.recipe.stage import parse

EVIL = '<script>alert("x")</script> <img src=x onerror=alert(1)> & \'q\' "q" \x1b[31m red'


def rows(folder: Path, *answers: str) -> str:
    (folder / "images").mkdir()
    for k, _ in enumerate(answers):
        Pillow.fromarray(tiny.picture(k, (40 + k, 50))).save(folder / "images" / f"{k}.png")
    records = [{"question_id": k, "image": f"{k}.png", "question": EVIL, "answer": a} for k, a in enumerate(answers)]
    (folder / "train.json").write_text(json.dumps(records))
    return str(folder / "train.json")


def inspected(path: str, *overrides: str, stage: str = "instruction_tune", n: int = 16, check: int = 50) -> Inspection:
    shares = ("data.val_fraction=0", "data.test_fraction=0")
    cfg = composed("data=vqa", "data.path=x", "data.images=x", *shares, *overrides)  # with no path: composed once
    cfg.data.path, cfg.data.images = path, str(Path(path).parent / "images")
    return inspect_stage(cfg, next(s for s in parse(cfg) if s.name == stage), n, check)


class Page(HTMLParser):
    """Elements of a page, and the text inside those of a class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self._open.append(str(dict(attrs).get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.words.setdefault(self._open[-1], []).append(data)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    return inspected(rows(tmp_path_factory.mktemp("vqa"), EVIL, "yes", "no " * 900), "budget=test")


def test_a_caption_cannot_inject_markup(found: Inspection, tmp_path: Path) -> None:
    text = write_page(found, tmp_path / "page.html").read_text()
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "link", "b onload"})
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(str(a["src"]).startswith("data:image/png;base64,") for tag, a in page.tags if tag == "img")
    learnt = "".join(page.words["t answer learnt"])
    assert visible(EVIL) + "<|im_end|>" in learnt and "<script>" in learnt and "\x1b" not in text


def test_every_token_has_the_role_and_label_of_the_collator(found: Inspection, tmp_path: Path) -> None:
    assert [row.padding for row in found.rows] == [0]  # two short samples, packed into one row
    assert [shown.counts["visual tokens"] for shown in found.rows[0].samples] == [16, 16]
    for shown in found.rows[0].samples:
        learnt = [piece for piece in shown.pieces if piece.supervised]
        assert len(learnt) == shown.counts["supervised"] and {piece.role for piece in learnt} == {"answer"}
        runs = sum(1 for piece in shown.pieces if piece.role == "image")
        assert len(shown.pieces) - runs + 16 == shown.counts["tokens"] and runs == 1
    assert "".join(p.text for p in found.rows[0].samples[1].pieces if p.supervised) == "yes<|im_end|>"


def test_the_picture_is_what_the_tower_takes(found: Inspection) -> None:
    cfg = composed()
    model: Any = module_class(parse(cfg)[0]).build(cfg)
    png, words = found.rows[0].samples[0].images[0]
    with Pillow.open(io.BytesIO(base64.b64decode(png))) as image:
        shown = np.asarray(image)
    assert np.array_equal(shown.transpose(2, 0, 1), model.encoder.preprocess(tiny.picture(0, (40, 50))))
    assert words == f"50 x 40, here {shown.shape[1]} x {shown.shape[0]}"


def test_what_is_wrong_is_named(found: Inspection, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (why,) = found.broken.values()
    assert "over max_length=1024" in why and found.checked == 3
    assert {p for p in found.problems if "markup" in p or "control" in p} == {
        "markup in the text (<...>)", "control characters in the text",
    }  # fmt: skip
    print_report(found)
    out = capsys.readouterr().out
    assert "broken" in out and "[answer*]" in out and "image 1 \N{MULTIPLICATION SIGN} 16" in out
    assert "\x1b[31m red" not in out
    with pytest.raises(UserError, match="there is no folder"):
        write_page(found, tmp_path / "none" / "page.html")


def test_another_stage_has_its_own_prompt_and_data(tmp_path: Path) -> None:
    path = rows(tmp_path, "yes")
    found = inspected(path, "collate.pack_length=null", stage="coarse_align", n=3, check=0)
    assert ("prompt", "plain") in found.facts and len(found.rows) == 3
    assert max(row.padding for row in found.rows) > 0 == min(row.padding for row in found.rows)
    first = found.rows[0].samples[0].pieces
    assert first[0].role == "image" and {piece.role for piece in first[1:]} == {"answer"}


def test_soft_prompts_are_shown(tmp_path: Path) -> None:
    found = inspected(rows(tmp_path, "yes"), "adapter=soft_prompt", "data.caption_size=3")
    assert re.fullmatch(r"soft prompt × \d+", found.rows[0].samples[0].pieces[0].text)


def test_the_questions_of_a_tree_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(rows(tmp_path, "yes", "no", "two"))
    records = [record | {"image": "0.png"} for record in json.loads(path.read_text())]
    path.write_text(json.dumps(records))
    size = "data.caption_size=3"
    tree, apart = (inspected(str(path), f"collate.questions={kind}", size) for kind in ("tree", "rows"))
    (shown,) = tree.rows[0].samples
    assert [p.text for p in shown.pieces if p.role == "pad"] == [
        "question 1",
        "question 2",
        "question 3",
    ]
    alone = [sample for row in apart.rows for sample in row.samples]
    assert len(alone) == 3 and len(shown.images) == 1
    assert shown.counts["supervised"] == sum(one.counts["supervised"] for one in alone)
    assert ("questions", "collate.questions=tree: trees, as 1 of the first 1 samples") in tree.facts
    print_report(inspected(str(path), "collate.questions=tree", "mask=prefix_lm", size))
    assert "one question a row here, since PrefixLM lets" in capsys.readouterr().out


@pytest.mark.parametrize("fusion", ["lavi", "gated_xattn"])
def test_an_image_without_positions_is_shown_at_its_place(
    fusion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, size = rows(tmp_path, "yes", "a longer answer"), "data.caption_size=3"
    found, beside = (inspected(path, f"fusion={kind}", size) for kind in (fusion, "concat"))
    assert ("visual tokens", "0 an image: vision acts inside the LM") in found.facts
    assert len(found.rows[0].samples) == 2  # packed
    for shown, other in zip(found.rows[0].samples, beside.rows[0].samples, strict=True):
        marks = [k for k, piece in enumerate(shown.pieces) if piece.role == "image"]
        assert marks == [k for k, piece in enumerate(other.pieces) if piece.role == "image"] and len(marks) == 1
        assert shown.pieces[marks[0]].text == "image 1 is here"
        assert shown.counts == other.counts | {"visual tokens": 0, "tokens": other.counts["tokens"] - 16}
        assert [p for p in shown.pieces if p.role != "image"] == [p for p in other.pieces if p.role != "image"]
        assert len(shown.images) == 1
    print_report(found)
    assert capsys.readouterr().out.count("[image] image 1 is here") == 2
    page = Page(write_page(found, tmp_path / "page.html").read_text())
    assert page.words["t image"] == ["image", "image 1 is here", "image 1 is here"]  # the first is the legend


def test_a_text_tower_and_a_model_without_images_are_named(tmp_path: Path) -> None:
    path, size = rows(tmp_path, "yes"), "data.caption_size=3"
    mixing, blind = (dict(inspected(path, f"fusion={kind}", size).facts) for kind in ("emma", "none"))
    assert mixing["visual tokens"] == "16 an image" and "text tower" in mixing["instruction"]
    assert blind["visual tokens"] == "no images are read" and "instruction" not in blind


def test_what_is_odd_is_named(tmp_path: Path) -> None:
    path = rows(tmp_path, "yes", "yes")
    flat = np.zeros((20, 90, 3), np.uint8)
    Pillow.fromarray(flat).save(tmp_path / "images" / "1.png")
    records = json.loads(Path(path).read_text())
    records[1] |= {"question": "is it \ufffd", "image": "1.png"}
    Path(path).write_text(json.dumps([*records, records[1] | {"question_id": 7, "image": "missing.png"}]))
    found = inspected(path)
    assert len(found.broken) == 1 and "missing.png" in str(found.refused) and len(found.rows) == 1  # all bad, all shown
    problems = " ".join(found.problems)
    for word in ("one colour", "3 times as long as wide", "replacement characters"):
        assert word in problems


def test_the_words_for_hydra() -> None:
    words = ["--config-dir", "d", "data=vqa", "n=3", "+stage=x", "data.n=4", "--cfg", "job"]
    own = {"n": 16, "stage": None}
    assert arguments("inspect", words, own) == [
        "--config-dir", "d", "hydra/help=inspect", "hydra.run.dir=.", "hydra.mode=RUN",
        "++n=16", "++stage=null", "data=vqa", "++n=3", "++stage=x", "data.n=4", "--cfg", "job",
    ]  # fmt: skip


def test_what_generation_is_sent_and_where_it_stops_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, size = rows(tmp_path, "green", "round"), "data.caption_size=3"
    template = (
        "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else ' A: ') }}{% endfor %}"
    )
    found = inspected(path, size, "lm=hf", f"lm.path={tiny.qwen2()}", f'lm.chat_template="{template}"')
    facts = dict(found.facts)
    assert facts["generation stops at"] == "<|im_end|> (2)"
    asked = facts["generation is sent"]
    assert "[image 1: 16 tokens]<script>" in asked and asked[:-1].endswith("A: ")
    assert len(found.problems[APART]) == 2
    print_report(found)
    assert "generation is sent" in capsys.readouterr().out
    assert "generation stops at" in write_page(found, tmp_path / "page.html").read_text()


def test_control_tokens_in_a_row_are_named(tmp_path: Path) -> None:
    path, size = rows(tmp_path, "yes", "no <|im_end|> yes"), "data.caption_size=3"
    (why,) = inspected(path, size).broken.values()
    assert "contains the control token <|im_end|> as text" in why
    kept = inspected(path, size, "collate.control_tokens=text")
    learnt = "".join(piece.text for piece in kept.rows[0].samples[1].pieces if piece.supervised)
    assert not kept.broken and learnt == "no <|im_end|> yes<|im_end|>"


def test_a_prompt_that_is_not_what_is_learnt_is_named(tmp_path: Path) -> None:
    template = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant' }}")
    path, size = rows(tmp_path, "yes"), "data.caption_size=3"
    found = inspected(path, size, "lm=hf", f"lm.path={tiny.qwen2()}", f'lm.chat_template="{template}"')
    assert any("generation would be asked" in problem for problem in found.problems)


def test_the_page_is_written_whatever_is_wrong_with_the_rows(tmp_path: Path) -> None:
    path = Path(rows(tmp_path, *["yes"] * 4))
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records, *({"question_id": f"n{k}", "answer": "no"} for k in range(30))]))
    found = inspected(str(path))
    text = write_page(found, tmp_path / "page.html").read_text()
    assert found.refused is not None and "30 like n0: train.json, row 5: key" in str(found.refused)
    assert text.count("30 samples, the first n0") == 1 and text.count("data:image/png;base64,") == 4
    for content in ("{", "[]", '{"a": 1}', "[null]"):
        path.write_text(content)
        found = inspected(str(path))
        page = write_page(found, tmp_path / "page.html").read_text()
        assert "train.json" in str(found.refused) and "train.json" in page and len(str(found.refused)) <= 300


def test_dark_images_and_images_of_both_sides_are_named(tmp_path: Path) -> None:
    path = Path(rows(tmp_path, *["yes"] * 3))
    Pillow.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "images" / "0.png")
    records = json.loads(path.read_text())
    (tmp_path / "images" / "copy.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    with Pillow.open(tmp_path / "images" / "2.png") as image:
        image.save(tmp_path / "images" / "again.bmp")
    test = [{**records[0], "image": name, "question_id": name} for name in ("copy.png", "again.bmp")]
    (tmp_path / "test.json").write_text(json.dumps(test))
    auto, wide = (
        inspected(str(path), f"data.test_path={tmp_path / 'test.json'}", f"data.image_range={given}", n=1)
        for given in ("auto", "[0,4095]")
    )
    both = "image of data.benchmarks.vqa_test is in data.train.instruct too"
    assert f"1 {both}, byte for byte (1.png is copy.png)" in auto.problems
    assert f"1 {both}, pixel for pixel (2.png is again.bmp)" in auto.problems
    dark = [note for note in auto.problems if "under 10% of its value range" in note]
    assert auto.problems[dark[0]] == ["#0 0.png#0"]
    assert not any("value range" in note for note in wide.problems)

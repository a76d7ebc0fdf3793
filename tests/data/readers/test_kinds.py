"""Kinds of faults that every reader meets: no value, an image spelled in many ways, an image without a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmlab.contracts.errors import DataError, brief
from vlmlab.data.images import ImageFolder
from vlmlab.data.overlap import same_bytes, sentence, stored_images
from vlmlab.data.readers.coco_captions import CocoCaptions
from vlmlab.data.readers.karpathy import KarpathyCaptions
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.records import without_nan
from vlmlab.data.readers.split import together
from vlmlab.data.readers.tar import TarShards, write_shard
from vlmlab.data.readers.vqa import VqaJson

HOLE = "@hole@"
Row = tuple[str, Any, str]
"""Image, answer (or caption), id."""


def vqa(row: Row) -> dict[str, Any]:
    return {"question_id": row[2], "image": row[0], "question": "q?", "answer": row[1]}


def many(row: Row) -> dict[str, Any]:
    return {"question_id": row[2], "image": row[0], "question": "q?", "answers": [row[1], "two"]}


def llava(row: Row) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": row[1]}]
    return {"id": row[2], "image": row[0], "conversations": turns}


def parts(row: Row) -> dict[str, Any]:
    asked = [{"type": "image_url", "image_url": {"url": row[0]}}, {"type": "text", "text": "q?"}]
    answered = {"role": "assistant", "content": [{"type": "text", "text": row[1]}]}
    return {"id": row[2], "messages": [{"role": "user", "content": asked}, answered]}


def karpathy(row: Row) -> dict[str, Any]:
    return {"filename": row[0], "imgid": row[2], "sentences": [{"raw": row[1]}]}


Make = Callable[[Path, Sequence[Row], str], str]


def listed(each: Callable[[Row], dict[str, Any]], name: str, folder: Path, rows: Sequence[Row], hole: str) -> str:
    """The rows as JSON or JSON lines; `hole` is written as it is wherever a row has `HOLE`."""
    made = [json.dumps(each(row)).replace(json.dumps(HOLE), hole) for row in rows]
    text = "\n".join(made) if name.endswith("l") else f"[{', '.join(made)}]"
    (folder / name).write_text(f'{{"images": {text}}}' if each is karpathy else text)
    return str(folder / name)


def coco(folder: Path, rows: Sequence[Row], hole: str) -> str:
    images = [{"id": n, "file_name": row[0]} for n, row in enumerate(rows)]
    notes = [{"id": row[2], "image_id": n, "caption": row[1]} for n, row in enumerate(rows)]
    text = json.dumps({"images": images, "annotations": notes}).replace(json.dumps(HOLE), hole)
    (folder / "coco.json").write_text(text)
    return str(folder / "coco.json")


READERS: dict[str, tuple[Any, Make]] = {
    "vqa": (partial(VqaJson, multi_turn=False), partial(listed, vqa, "v.json")),
    "vqa lines": (partial(VqaJson, multi_turn=False), partial(listed, vqa, "v.jsonl")),
    "vqa of many answers": (partial(VqaJson, multi_turn=False), partial(listed, many, "v.json")),
    "llava": (LlavaJson, partial(listed, llava, "l.json")),
    "llava lines": (LlavaJson, partial(listed, llava, "l.jsonl")),
    "llava in parts": (LlavaJson, partial(listed, parts, "l.json")),
    "coco": (CocoCaptions, coco),
    "karpathy": (KarpathyCaptions, partial(listed, karpathy, "k.json")),
}
NOTHING = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "null", '""', '"  \\n"', "[]", '["a"]', "{}", "true"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(40):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / f"{n}.png")
    return tmp_path


def opened(name: str, folder: Path, rows: Sequence[Row], hole: str = "", **more: Any) -> Any:
    kind, make = READERS[name]
    return kind(make(folder, rows, hole), str(folder), **more)


@pytest.mark.parametrize("name", READERS)
def test_no_value_is_a_bad_row(name: str, folder: Path) -> None:
    for hole in NOTHING:
        rows = [("0.png", "yes", "a"), ("1.png", HOLE, "b"), ("2.png", "no", "c")]
        with pytest.raises(DataError) as caught:
            opened(name, folder, rows, hole)
        text = str(caught.value)
        assert len(text) <= 300 and "\n" not in text and (" 2: " in text), (hole, text)
        source = opened(name, folder, rows, hole, max_bad_fraction=0.4)
        answers = [source.turns(i)[0].answer for i in range(len(source))]
        assert len(source.skipped) == 1 and (answers == ["yes", "no"] or name == "vqa of many answers"), hole


@pytest.mark.parametrize("name", ["vqa", "vqa lines", "coco"])
def test_an_id_that_is_no_number_is_a_bad_row(name: str, folder: Path) -> None:
    for hole in NOTHING[:6]:
        with pytest.raises(DataError, match=r" 2: '(question_)?id' is null \(or NaN\) instead of text"):
            opened(name, folder, [("0.png", "yes", "1"), ("1.png", "no", HOLE)], hole)


def test_a_number_is_an_answer_and_no_caption(folder: Path) -> None:
    rows = [("0.png", HOLE, "1")]
    assert [opened("vqa", folder, rows, hole).turns(0)[0].answer for hole in ("3", "2.5", "-0")] == ["3", "2.5", "0"]
    for name in ("llava", "coco", "karpathy"):
        with pytest.raises(DataError, match="is a number instead of text"):
            opened(name, folder, rows, "3")


def test_cells_without_a_word(folder: Path) -> None:
    for word in ("", "nan", "NaN", " NA", "None", "inf", "NaT", "<NA>", "null"):
        table = folder / "results.csv"
        table.write_text(f"image_name| comment_number| comment\n0.png| 0| A dog.\n1.png| 0| {word}\n")
        if word == " NA":  # a word
            assert len(KarpathyCaptions(str(table), str(folder))) == 2
            continue
        with pytest.raises(DataError, match="line 2: has no image name or no caption"):
            KarpathyCaptions(str(table), str(folder))
    line = 'raw,sentids,split,filename\n"[""A dog."", NaN]","[1, NaN]",train,0.png\n'
    (folder / "flickr.csv").write_text(line)
    with pytest.raises(DataError, match="row 1: 'raw of sentence 2' is null"):
        KarpathyCaptions(str(folder / "flickr.csv"), str(folder))


def test_other_ends_of_lines_are_words(folder: Path) -> None:
    words = "one\u2028two\x85three\x0cfour"
    (folder / "results.token").write_text(f"0.png#0\t{words}\r\n1.png#0\tplain\n", newline="")
    found = KarpathyCaptions(str(folder / "results.token"), str(folder))
    assert [found.turns(i)[0].answer for i in range(2)] == [words, "plain"]
    lines = [json.dumps(vqa((f"{n}.png", words, str(n))), ensure_ascii=False) for n in range(3)]
    (folder / "v.jsonl").write_text("\n".join(lines))
    assert [t.answer for i in range(3) for t in VqaJson(str(folder / "v.jsonl")).turns(i)] == [words] * 3


def test_values_of_tables() -> None:
    nan = float("nan")
    assert without_nan({"a": nan, "b": [1.5, -float("inf"), {"c": nan}], "d": b"x"}) == {
        "a": None, "b": [1.5, None, {"c": None}], "d": b"x",
    }  # fmt: skip


def test_the_split_is_a_word_that_is_known(folder: Path) -> None:
    rows = [{**karpathy((f"{n}.png", "c", str(n))), "split": s} for n, s in enumerate(("train", "tset", ["val"], 5))]
    (folder / "k.json").write_text(json.dumps({"images": rows}))
    found = KarpathyCaptions(str(folder / "k.json"), str(folder), split="train", max_bad_fraction=0.8)
    assert (len(found), [s.id for s in found.skipped]) == (1, ["k-2", "k-3", "k-4"])
    rows = [{**vqa((f"{n}.png", "c", str(n))), "split": s} for n, s in enumerate(("train", "tset", None, "train"))]
    (folder / "v.json").write_text(json.dumps(rows))
    source = VqaJson(str(folder / "v.json"), split="train", val_fraction=0, max_bad_fraction=0.5)
    assert (len(source), [s.id for s in source.skipped]) == (2, ["1", "2"])
    with pytest.raises(DataError, match=r"row 2: 'split' is 'tset', no known split"):
        VqaJson(str(folder / "v.json"), split="train")


SPELLED = ["{}", "./{}", ".//{}", "x/../{}", "././{}", " {} "]


@pytest.mark.parametrize("name", READERS)
def test_an_image_is_in_one_split_however_it_is_spelled(name: str, folder: Path) -> None:
    os.link(folder / "7.png", folder / "hard.png")
    rows = [(form.format(f"{n}.png"), "yes", f"{n}-{k}") for n in range(40) for k, form in enumerate(SPELLED)]
    rows += [("hard.png", "yes", "hard")]
    more = {"val_fraction": 0.3} if "llava" in name else {"val_fraction": 0.2, "test_fraction": 0.3}
    words = ("train", "val") if "llava" in name else ("train", "val", "test")
    sources = [opened(name, folder, rows, split=split, **more) for split in words]
    images = [{s[i].image_ids[0] for i in range(len(s))} for s in sources]
    assert sum(len(s) for s in sources) == len(rows) and all(len(found) > 3 for found in images)
    assert set().union(*images) == {*(f"{n}.png" for n in range(40)), "hard.png"}  # each has one name
    assert sum(map(len, images)) == 41 and any({"7.png", "hard.png"} <= found for found in images)
    alone = opened(name, folder, [(f"{n}.png", "yes", str(n)) for n in range(40)], split="train", **more)
    assert images[0] - {"hard.png"} == {alone[i].image_ids[0] for i in range(len(alone))}  # as without other spellings


def test_records_that_share_an_image_stay_together(folder: Path) -> None:
    assert together([["a"], ["b", "c"], ["c", "a"], ["d"]]) == ["a", "a", "a", "d"]
    assert together([["z", "a"]]) == ["z"]  # as ever, by its first image
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": str(n), "image": [f"{n}.png", f"{n + 1}.png"], "conversations": turns} for n in range(0, 39)]
    rows = [row for n, row in enumerate(rows) if n % 4 < 2]  # three images a group
    (folder / "l.json").write_text(json.dumps(rows))
    train, val = (LlavaJson(str(folder / "l.json"), split=s, val_fraction=0.5) for s in ("train", "val"))
    images = [{name for i in range(len(s)) for name in s[i].image_ids} for s in (train, val)]
    assert not images[0] & images[1] and len(train) + len(val) == 20 and min(map(len, images)) >= 3


FOREIGN = {
    "data:image/png;base64," + "A" * 160_000: "is a data URI, and images inside the text are not supported",
    "DATA:image/jpeg;base64,/9j/" + "B" * 900: "is a data URI, and images inside the text are not supported",
    "https://example.org/" + "c" * 900 + ".jpg": "is a URL, and images are not downloaded",
    "s3://bucket/a.jpg": "is a URL, and images are not downloaded",
    "file:///a.png": "is a URL, and images are not downloaded",
    "../0.png": "leaves the image folder",
    "/0.png": "is an absolute path",
    "d" * 4000 + ".png": "is not in",
}


@pytest.mark.parametrize("name", READERS)
def test_images_that_are_no_files(name: str, folder: Path) -> None:
    for image, reason in FOREIGN.items():
        with pytest.raises(DataError) as caught:
            opened(name, folder, [(image, "yes", "1")])
        assert reason[:30] in str(caught.value) and len(str(caught.value)) <= 300, str(caught.value)


def test_many_bad_rows_of_one_reason_are_one_line(folder: Path) -> None:
    rows = [("0.png", "yes", "good"), *((f"no/{n}.png", "yes", f"gone{n}") for n in range(30)), ("1.png", "", "e")]
    for name in READERS:
        with pytest.raises(DataError) as caught:
            opened(name, folder, rows, max_bad_fraction=0.1)
        text = str(caught.value)
        assert "30 like " in text and len(text) <= 300 and "cannot be used" in text, text


def test_messages_are_short_and_keep_both_ends() -> None:
    assert brief("as it is") == "as it is"
    long = f"/data/{'x' * 900}/train.json, row 3: 'answer' is null; fill it in or remove the row"
    made = brief(long)
    assert len(made) <= 300 and made.startswith("/data/x") and made.endswith(long[-66:])
    assert len(brief("word " * 900)) == 300 == len(str(DataError("y" * 5000)))
    assert all(len(brief(f"{'z' * n} " * 40, 120)) <= 120 for n in range(1, 200, 7))


def test_links_lead_only_where_a_key_says(folder: Path) -> None:
    root, other = folder / "mix", folder / "disk" / "coco"
    root.mkdir()
    other.mkdir(parents=True)
    Image.new("RGB", (3, 1)).save(other / "a.png")
    os.symlink(other, root / "coco")
    os.symlink(other / "a.png", root / "b.png")
    os.symlink(folder / "0.png", root / "out.png")
    os.symlink(folder / "nowhere.png", root / "gone.png")
    plain, named = ImageFolder(root), ImageFolder(root, [str(folder / "disk")])
    assert "data.image_roots names further folders" in str(plain.check("coco/a.png")) and "is a link" in str(
        plain.check("b.png")
    )
    assert named.load("coco/a.png").shape == named.load("b.png").shape == (1, 3, 3)
    assert named.check("out.png") == "leads out of the folders that data.image_roots names" == named.check("gone.png")
    assert "leaves" in str(named.check("../0.png")) and "absolute" in str(named.check(str(other / "a.png")))
    assert named.same(["coco/a.png", "b.png"]) == {"coco/a.png": "b.png", "b.png": "b.png"}
    with pytest.raises(DataError, match=r"data\.image_roots names .*nothing, which is not a folder"):
        ImageFolder(root, str(folder / "nothing"))
    path = listed(llava, "l.json", root, [("coco/a.png", "yes", "1")], "")
    assert LlavaJson(path, image_roots=[str(folder / "disk")])[0].images[0].shape == (1, 3, 3)
    assert LlavaJson(path, image_roots=[str(other)])[0].image_ids == ("coco/a.png",)


def test_an_object_of_rows_by_their_ids(folder: Path) -> None:
    """GQA's questions (arXiv 1902.09506): id -> {imageId, question, answer, ...}; the images have no ending there."""
    rows: dict[str, Any] = {
        f"0{n}": {"imageId": str(n), "question": "q?", "answer": "yes", "fullAnswer": "Yes.", "groups": {"local": None}}
        for n in range(3)
    }
    (folder / "g.json").write_text(json.dumps(rows))
    source = VqaJson(str(folder / "g.json"), image_key="imageId", multi_turn=False)
    assert [(source[i].id, source[i].image_ids) for i in (0, 2)] == [("00", ("0.png",)), ("02", ("2.png",))]
    (folder / "g.json").write_text(json.dumps({**rows, "bad": None}))
    with pytest.raises(DataError, match="row 4: is null"):
        VqaJson(str(folder / "g.json"), image_key="imageId")
    for other in ({"info": {}, "rows": []}, {}, {"a": None}):
        (folder / "g.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match="one object"):
            VqaJson(str(folder / "g.json"))
    Image.new("RGB", (1, 1)).save(folder / "1.jpg")
    (folder / "g.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"row 2: image '1' is not in"):  # which of two?
        VqaJson(str(folder / "g.json"), image_key="imageId")


def test_copies_on_both_sides_are_found(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    ours = opened("vqa", folder, [(f"{n}.png", "yes", str(n)) for n in range(5)])
    theirs = opened("coco", folder, [("copy.png", "A", "1"), ("9.png", "A", "2"), ("4.png", "A", "3")])
    pairs = same_bytes(stored_images(ours), stored_images(theirs))
    assert pairs == [("3.png", "copy.png"), ("4.png", "4.png")]
    assert sentence(pairs, "a", "b") == "2 images of b are in a too, byte for byte (3.png is copy.png)"
    shard = write_shard(folder / "s.tar", [("0.png", (folder / "2.png").read_bytes()), ("0.txt", b"A")])
    assert same_bytes(stored_images(ours), stored_images(TarShards(str(shard)))) == [("2.png", "s/0.png")]
    assert stored_images(np) == []  # type: ignore[arg-type]  # anything that keeps none


ODD: list[Any] = [None, float("nan"), float("inf"), "", " ", "x", "\0", "\ud800", 7, -1.5, True, [], ["x"], [None],
                  [[1]], {}, {"x": 1}, [{}], [{"type": 1}], 10**30]  # fmt: skip


def changed(value: Any) -> Any:
    """Every record that differs from this one in one place."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in changed(value[key]))
    if isinstance(value, list):
        for k in range(len(value)):
            yield from ([*value[:k], other, *value[k + 1 :]] for other in changed(value[k]))
    yield from ODD


@pytest.mark.parametrize("name", ["vqa", "vqa of many answers", "llava", "llava in parts", "coco", "karpathy"])
def test_any_row_is_read_or_is_one_sentence(name: str, folder: Path) -> None:
    kind, make = READERS[name]
    path = Path(make(folder, [("0.png", "yes", "1")], ""))
    whole = json.loads(path.read_text())
    read = 0
    for content in changed(whole):
        path.write_text(json.dumps(content))
        try:
            source = kind(str(path), str(folder), max_bad_fraction=0.0)
        except DataError as error:
            assert len(str(error)) <= 300 and "\n" not in str(error), content
            continue
        read += 1
        said = [text for i in range(len(source)) for turn in source[i].turns for text in (turn.prompt, turn.answer)]
        assert all(text.strip() and "nan" not in text.lower() and "inf" not in text.lower() for text in said), content
    assert read > 3

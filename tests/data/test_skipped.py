from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.module import Window, Windows
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.place import find_files, is_id, is_there, split_files
from vlmlab.data.readers.vqa import VqaJson
from vlmlab.data.sampler import Order
from vlmlab.data.skipped import (
    Replaced,
    Skipped,
    TooManyBad,
    check_share,
    grouped,
    next_usable,
    note,
    noted,
    screen,
)  # fmt: skip
from vlmlab.runs.files import read_rows
from vlmlab.train.skips import Skips


class Holed:
    """Numbers, of which some cannot be loaded and some are too long."""

    def __init__(self, size: int, bad: set[int], long: set[int] | None = None) -> None:
        self.size, self.bad, self.long = size, bad, long or set()
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise DataError(f"image {index} is broken; replace it")
        return Sample(str(index), (), (Turn("q", "x" * (99 if index in self.long else 1)),))

    def label(self, index: int) -> str:
        return f"n{index}"


def collate(samples: list[Sample]) -> Any:
    for sample in samples:
        if len(sample.turns[0].answer) > 50:
            raise DataError(f"Sample {sample.id} has 99 tokens, over max_length=50; raise it.")
    return [sample.id for sample in samples]


def windows(ranks: int = 1, rank: int = 0, steps: int = 12) -> list[Window]:
    source = Holed(20, {3, 4, 19}, {0, 11})
    made = Windows(source, collate, Order(20, 4, 0, "s"), steps, rank, ranks, replace=True)
    return [made[step] for step in range(steps)]


def test_the_next_usable_sample_stands_for_a_bad_one() -> None:
    source = Holed(20, {3, 4, 19}, {0})
    skipped: list[Skipped] = []
    found = [next_usable(source, i, lambda s: collate([s]), skipped).id for i in (2, 3, 4, 19)]
    assert found == ["2", "5", "5", "1"]
    assert [s.id for s in skipped] == ["n3", "n4", "n4", "n19", "n0"] and "over max_length" in skipped[-1].reason
    assert [Replaced(source)[i].id for i in (0, 3)] == ["0", "5"]
    with pytest.raises(TooManyBad, match="4 rows from n0 on: 4 of 4 rows cannot be used"):
        next_usable(Holed(4, {0, 1, 2, 3}), 0, None, [])


def test_ranks_workers_and_resume_see_the_same_samples() -> None:
    whole = windows()
    bad = {s.id for window in whole for s in window.skipped}
    assert bad == {"n3", "n4", "n19", "n0", "n11"} and all(window.error is None for window in whole)
    halves = [windows(2, rank) for rank in (0, 1)]
    for step, window in enumerate(whole):
        assert window.batches[0] == [*halves[0][step].batches[0], *halves[1][step].batches[0]]
    source = Holed(20, {3, 4, 19}, {0, 11})
    later = Windows(source, collate, Order(20, 4, 0, "s"), 12, replace=True)[7]  # nothing before was ever looked at
    assert later == whole[7]
    strict = Windows(source, collate, Order(20, 4, 0, "s"), 12)
    assert sum(strict[step].error is not None for step in range(5)) >= 2


def test_screening_ends_a_run_that_cannot_be_saved() -> None:
    check = lambda sample: collate([sample])  # noqa: E731
    assert len(screen(Holed(1000, set(range(10))), check, 2000, 0.01, "data.train.x")) == 10
    with pytest.raises(TooManyBad, match=r"x: 20 of 1000 rows .* data.max_bad_fraction=0.01 .*: 20 like n0: image"):
        screen(Holed(1000, set(range(0, 1000, 50))), check, 2000, 0.01, "data.train.x")
    with pytest.raises(TooManyBad, match=r"a draw of 500 from 10000") as caught:
        screen(Holed(10000, {i for i in range(10000) if i % 20 == 0}), check, 500, 0.01, "x")
    assert len(caught.value.skipped) > 20 and caught.value.listed and "vlmlab inspect lists all" in str(caught.value)
    some = screen(Holed(10000, {i for i in range(10000) if i % 100 == 0}), check, 500, 0.01, "x")  # as allowed
    assert 0 < len(some) < 15


def test_the_file_has_each_row_once(tmp_path: Path) -> None:
    first, second = Skipped("a", "broken"), Skipped("ü", "too long")
    assert note(tmp_path, "d", [first, first]) == 1 and note(tmp_path, "d", [second, first]) == 2
    assert note(tmp_path, "e", [first]) == 1 and note(tmp_path, "e", []) == 1
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"data": "d", "id": "torn')
    assert [(r["data"], r["id"], r["reason"]) for r in noted(tmp_path)] == [
        ("d", "a", "broken"), ("d", "ü", "too long"), ("e", "a", "broken")
    ]  # fmt: skip


ENDS = [
    "a\u2028b",
    "a\u2029b",
    "a\x85b",
    "a\x0bb",
    "a\x0cb",
    "a\x1cb",
    "a\x1db",
    "a\nb",
    "a\r\nb",
    'a"b',
    "a\\",
    "\ud800",
    "ü",
]


def test_a_row_counts_once_whatever_it_is_called(tmp_path: Path) -> None:
    rows = [Skipped(id_, f"bad {id_} reason") for id_ in ENDS]
    assert [note(tmp_path, "d", rows) for _ in range(3)] == [len(ENDS)] * 3
    assert (tmp_path / "skipped.jsonl").read_bytes().count(b"\n") == len(ENDS)
    assert [(row["id"], row["reason"]) for row in noted(tmp_path)] == [(s.id, s.reason) for s in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"a": s}, ensure_ascii=False) + "\n" for s in ENDS[:4]))
    assert [row["a"] for row in read_rows(tmp_path / "rows.jsonl")] == ENDS[:4]


def test_a_line_behind_a_torn_one_is_kept(tmp_path: Path) -> None:
    note(tmp_path, "d", [Skipped("a", "x")])
    with (tmp_path / "skipped.jsonl").open("ab") as file:
        file.write('{"data": "d", "id": "ü'.encode()[:-1])  # killed inside of a character
    assert note(tmp_path, "d", [Skipped("b", "y")]) == 2 == note(tmp_path, "d", [Skipped("b", "y")])
    assert [row["id"] for row in noted(tmp_path)] == ["a", "b"]


def test_bad_rows_are_grouped_by_what_is_wrong() -> None:
    said = [Skipped(f"r{n}", f"/d/a.json, row {n}: image '{n}.png' is not in /d; correct it") for n in range(900)]
    said += [
        Skipped("e", "/d/a.json, row 5: 'answer' is empty; fill it in"),
        Skipped("q", "/d/a.json, row 5: 'q' is empty; x"),
    ]
    groups = grouped(said)
    assert [(g.count, g.first) for g in groups] == [(900, "r0"), (1, "e"), (1, "q")]
    assert [g.line() for g in groups] == [
        "900 like r0: a.json, row 0: image '0.png' is not in /d", "e: a.json, row 5: 'answer' is empty",
        "q: a.json, row 5: 'q' is empty",
    ]  # fmt: skip
    said += [Skipped("x" * 500, f"{word} {'z' * 400}; y") for word in ("one", "two", "three")]
    with pytest.raises(TooManyBad) as caught:
        check_share(said, 10_000, 0.01, "p" * 400)
    text = str(caught.value)
    assert len(text) <= 300 and "900 like r0" in text and text.endswith("; 4 other reasons"), text


def config(**more: Any) -> Any:
    return OmegaConf.create({"data": {"max_bad_fraction": 0.1, "screen": 100, **more}})


def test_a_run_writes_down_replaces_and_ends(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(data="instruct")
    source = Holed(20, {3})
    source.skipped = [Skipped("r1", "no answer")]
    skips = Skips(config(), stage, source, tmp_path, True)
    skips.look(collate)
    assert skips.replaces and [r["id"] for r in noted(tmp_path)] == ["r1", "n3"]
    nobody: Any = None
    skips.on_train_batch_start(nobody, nobody, Window(0, [], None, (Skipped("n3", "again"),)), 0)
    with pytest.raises(TooManyBad, match=r"data.train.instruct: 3 of 21 rows"):
        skips.on_train_batch_start(nobody, nobody, Window(1, [], None, (Skipped("n4", "cut"),)), 1)
    many = Skips(config(), stage, Holed(20, {1, 2, 3}), tmp_path / "b", True)
    with pytest.raises(TooManyBad):
        many.look(collate)
    assert len(noted(tmp_path / "b")) == 3
    strict = Skips(OmegaConf.create({"data": {}}), stage, source, tmp_path / "c", True)
    assert not strict.replaces


def write_records(folder: Path, count: int, broken: int) -> str:
    (folder / "images").mkdir()
    rows = []
    for n in range(count):
        Image.new("RGB", (2, 2)).save(folder / "images" / f"{n}.png")
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "" if n < broken else "Yes."}]
        rows.append(json.dumps({"id": n, "image": f"images/{n}.png", "conversations": turns}))
    (folder / "a.jsonl").write_text("\n".join(rows))
    return str(folder / "a.jsonl")


def test_one_percent_is_skipped_and_two_end_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    source = LlavaJson(write_records(tmp_path / "one", 100, 1), max_bad_fraction=0.01)
    assert len(source) == 99 and source.skipped[0].id == "0" and "line 1: 'text of turn 2'" in source.skipped[0].reason
    with pytest.raises(TooManyBad) as caught:
        LlavaJson(write_records(tmp_path / "two", 100, 2), max_bad_fraction=0.01)
    text = str(caught.value)
    assert "2 of 100 rows cannot be used, more than data.max_bad_fraction=0.01" in text
    assert "2 like 0: a.jsonl, line 1: 'text of turn 2' is empty" in text and "\n" not in text and len(text) <= 300


def test_every_line_of_the_broken_file_has_its_decision(shared_data: Path) -> None:
    path = shared_data / "llava_records" / "broken_lines_derived.jsonl"
    source = LlavaJson(str(path), max_bad_fraction=1.0)
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    assert len(source) + len(source.skipped) == len(lines) and len(source) >= 1
    assert all(f"{path}" in s.reason for s in source.skipped)


@pytest.mark.parametrize("name", ["llava_instruct_coco.json", "scienceqa_mixed_text_and_missing_image.json"])
def test_real_records_without_their_images_are_skipped(shared_data: Path, name: str) -> None:
    path = shared_data / "llava_records" / name
    count = len(json.loads(path.read_text(encoding="utf-8")))
    with pytest.raises(TooManyBad, match=r"more than data\.max_bad_fraction=0\.01"):
        LlavaJson(str(path), max_bad_fraction=0.01)
    source = LlavaJson(str(path), max_bad_fraction=0.6)
    assert len(source) + len(source.skipped) == count and all("is not in" in s.reason for s in source.skipped)


def test_nasty_images_behind_records(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "nasty_images"
    files = sorted(p.name for p in (root / "files").iterdir())
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"id": name, "image": name, "conversations": turns} for name in files]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    source = LlavaJson(str(tmp_path / "a.json"), images=str(root / "files"), max_bad_fraction=1.0, verify=True)
    assert (len(source), len(source.skipped), len(files)) == (40, 14, 54)
    whole = LlavaJson(str(tmp_path / "a.json"), images=str(root / "files"), max_bad_fraction=1.0)
    skipped: list[Skipped] = []
    for index in range(len(whole)):
        next_usable(whole, index, None, skipped)
    assert {s.id for s in skipped} | {s.id for s in whole.skipped} == {s.id for s in source.skipped}


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("here")
    for name in ("train.json", "validate.json", "test.json", "x.csv", ".hidden.json"):
        (tmp_path / "here" / name).write_text("[]")
    names = [file.name for file in find_files("here", (".json",))]
    assert names == ["test.json", "train.json", "validate.json"]
    files = find_files("here/*.json", (".json",))
    assert [[f.name for f in split_files(files, s, 0.1, 0.1)[0]] for s in ("train", "val", "test")] == [
        ["train.json"], ["validate.json"], ["test.json"]
    ]  # fmt: skip
    assert split_files(files, "train", 0.1, 0.2)[1] == (0.0, 0.0) and split_files(files[:1], "val", 0.1, 0.2)[1] == (
        0.1,
        0.2,
    )
    assert is_id("lmms-lab/LLaVA-ReCap-558K") and not any(
        map(is_id, ("here/x", "a/b.json", "/a/b", "~/x", "a/b/c", "a"))
    )
    assert is_there("here/*.csv") and is_there("here") and not is_there("there") and not is_there("here/*.tar")
    with pytest.raises(DataError, match=r"No file fits data\.path=here/z"):
        find_files("here/z*.json", (".json",))
    with pytest.raises(DataError, match=r"data.path=some-one/no-such-set is neither a path .* nor a data set the hub"):
        find_files("some-one/no-such-set", (".parquet",))


def test_questions_in_the_sets_own_forms(tmp_path: Path) -> None:
    for n in range(4):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{n}.png")
    slake = [
        {"qid": n, "img_name": f"{n}.png", "question": "q?", "answer": "Yes", "q_lang": ("en", "zh")[n % 2],
         "answer_type": "CLOSED"} for n in range(4)
    ]  # fmt: skip
    (tmp_path / "S").mkdir()
    for name, rows in (("train", slake[:2]), ("validate", slake[2:3]), ("test", slake[2:])):
        (tmp_path / "S" / f"{name}.json").write_text(json.dumps(rows))
    keys: dict[str, Any] = {"image_key": ["img_name", "image"], "id_key": ["qid", "question_id"]}
    where = {"q_lang": ["en"]}
    parts = [
        VqaJson(str(tmp_path / "S"), str(tmp_path), s, multi_turn=False, where=where, **keys)
        for s in ("train", "val", "test")
    ]
    assert [[p[i].id for i in range(len(p))] for p in parts] == [["0"], ["2"], ["2"]]
    rad = [{"qid": n, "image_name": f"{n}.png", "question": "q?", "answer": 3, "phrase_type": t}
           for n, t in enumerate(["freeform", "para", "test_freeform", "test_para"])]  # fmt: skip
    (tmp_path / "rad.json").write_text(json.dumps(rad))
    words = {"train": ["freeform", "para"], "test": ["test_freeform", "test_para"]}
    keys = {"image_key": ["image_name", "image"], "id_key": ["qid"], "split_keys": ["split", "phrase_type"]}
    test = VqaJson(str(tmp_path / "rad.json"), split="test", split_words=words, multi_turn=False, **keys)
    assert [test[i].id for i in range(len(test))] == ["2", "3"]

from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from tests.data.readers.test_any_value import is_usable, places, replaced, values
from tests.test_conf import composed

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.fingerprint import source_fingerprint
from vlmlab.data.overlap import reads, stored_images
from vlmlab.data.parts import NamedMixture
from vlmlab.data.readers import opened
from vlmlab.data.readers.hub import HubRecords
from vlmlab.data.readers.hub_stream import HubStream
from vlmlab.data.readers.llava import LlavaFormat
from vlmlab.data.readers.mapped import Reader, mapping
from vlmlab.data.skipped import TooManyBad, next_usable

WITHOUT = "needs datasets (pip install 'vlmlab[hub]')"
COMMIT = "0123456789" * 4


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets", reason=WITHOUT)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def png(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 3), (width, 0, 0)).save(file, "png")
    return file.getvalue()


def asked(number: int, width: int | None = None) -> dict[str, Any]:
    image = {"bytes": png(number + 1 if width is None else width), "path": None}
    return {"picture": image, "query": f"Which {number}?", "answer": str(number), "other": 0.5}


def table(folder: Path, rows: list[dict[str, Any]], name: str = "train-00000-of-00001.parquet") -> str:
    arrow, parquet = (pytest.importorskip(module, reason=WITHOUT) for module in ("pyarrow", "pyarrow.parquet"))
    folder.mkdir(exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), folder / name)
    return str(folder)


COLUMNS = {"image": "picture", "question": "query"}


def widths(source: Any) -> list[int]:
    return [source[i].images[0].shape[1] for i in range(len(source))]


IMAGE = {"bytes": png(2), "path": "a.png"}
RECORDS: dict[str, dict[str, Any]] = {
    "conversations": {
        "image": [IMAGE],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q?"}]},
            {"role": "assistant", "content": "a"},
        ],
    },
    "questions": {"image": IMAGE, "question": "q?", "answer": "red", "answers": ["red", "blue"], "question_type": "x"},
    "captions": {"image": IMAGE, "caption": ["One.", "Another."]},
}


@pytest.mark.parametrize("kind", RECORDS)
def test_any_value_anywhere_in_a_row_is_used_or_refused(kind: str) -> None:
    record = RECORDS[kind]
    found = mapping("set", list(record), None, None)
    assert found.records == kind
    reader = Reader(found, "Describe.", LlavaFormat(), "", None, False, None)
    is_usable(reader.sample(reader.row(Path("set/train"), 1, record), "x"))

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(sorted(places(record), key=str)), values)
    def every_row(place: Any, value: Any) -> None:
        try:
            is_usable(reader.sample(reader.row(Path("set/train"), 1, replaced(record, place, value)), "x"))
        except DataError as error:
            assert str(error).startswith("set/train, row 1: ") and "; " in str(error) and len(str(error)) <= 300

    every_row()


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for kind in (HubRecords, HubStream):
        with pytest.raises(UserError, match=r"the package datasets.*not installed; run pip install 'vlmlab\[hub\]'"):
            kind("anything", size=1)


def test_a_hub_that_is_out_of_reach_is_said_at_once(datasets: Any, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **more: Any) -> None:
        assert more["timeout"] <= 10
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(
        DataError, match=r"hub cannot be reached \(ConnectionError\) and its cache has no such data set"
    ):
        HubRecords("owner/name", cache=cache)


def test_what_was_read_of_the_hub_before_is_used_without_it(
    datasets: Any, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    HubRecords(table(tmp_path / "name", [asked(n) for n in range(3)]), columns=COLUMNS, cache=cache)
    (made,) = (tmp_path / "cache" / "name").glob("default/*/*/dataset_info.json")
    kept = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / COMMIT
    shutil.copytree(made.parent, kept)
    for place in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(place, True)
    source = HubRecords("owner/name", columns=COLUMNS, cache=cache)
    assert widths(source) == [1, 2, 3] and source_fingerprint(source)["commit"] == COMMIT
    with pytest.raises(DataError, match=f"the cache has the commit {COMMIT} and not"):
        HubRecords("owner/name", columns=COLUMNS, cache=cache, revision=COMMIT[::-1])


def test_questions_by_mapped_columns(datasets: Any, tmp_path: Path, cache: str) -> None:
    path = table(tmp_path / "q", [asked(n) for n in range(6)])
    source = HubRecords(path, columns=COLUMNS, cache=cache, suffix="Short.")
    assert len(source) == 6 and widths(source) == [1, 2, 3, 4, 5, 6]
    sample = source[4]
    assert (sample.id, sample.id) == (source.label(4), "q-train-5") and sample.turns == source.turns(4)
    assert (sample.turns[0].prompt, sample.turns[0].answer) == ("Which 4?\nShort.", "4")
    assert len(stored_images(source)) == 6 and stored_images(source)[2].read() == png(3)
    few = HubRecords(path, columns=COLUMNS, cache=cache, size=2, seed=1)
    assert widths(few) == widths(HubRecords(path, columns=COLUMNS, cache=cache, size=2, seed=1)) and len(few) == 2


def test_wrong_keys_are_named(datasets: Any, tmp_path: Path, cache: str) -> None:
    path = table(tmp_path / "q", [asked(0)])
    for keys, words in (
        ({"columns": {"x": "y"}}, r"data\.columns\.x is unknown; the keys are image"),
        ({"columns": {"question": "nope"}}, r"no column 'nope' \(columns: picture, query, answer, other\)"),
        ({}, r"has no column for conversations, question, caption"),
        ({"records": "captions"}, r"has no column for caption"),
        ({"columns": COLUMNS, "split": "test", "splits": {"test": "mini"}}, r"no split 'mini' \(splits: train\)"),
        ({"columns": COLUMNS, "split": "val", "val_fraction": 0.0}, r"no row for the split 'val' \(1 in all\)"),
    ):
        with pytest.raises(UserError, match=words):
            HubRecords(path, cache=cache, **keys)
    for wrong in ("nothing", str(tmp_path / "nothing")):
        with pytest.raises(DataError, match="is not there; give a file, a folder, a glob, or an id of the hub"):
            HubRecords(wrong, cache=cache)


def test_other_formats_stay_shut(datasets: Any, tmp_path: Path, cache: str) -> None:
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "train.txt").write_text("hello")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text('{"question": 1\n')
    with pytest.raises(DataError, match=r"files that end in \.pkl"):
        HubRecords(str(tmp_path / "a.pkl"), cache=cache)
    with pytest.raises(DataError, match="of the format 'text', and only parquet, arrow, json, csv, imagefolder"):
        HubRecords(str(tmp_path / "words"), cache=cache)
    with pytest.raises(DataError, match="cannot be read by the package datasets"):
        HubRecords(str(tmp_path / "json"), cache=cache)


def test_bad_rows_have_reasons_and_are_replaced(datasets: Any, tmp_path: Path, cache: str) -> None:
    rows = [asked(n) for n in range(4)]
    rows[1]["picture"]["bytes"], rows[2]["query"] = png(9)[:40], " "
    path = table(tmp_path / "q", rows)
    source = HubRecords(path, columns=COLUMNS, cache=cache)
    for index, words in ((1, "q/train, row 2: Image of the row"), (2, "q/train, row 3: 'question' is empty")):
        with pytest.raises(DataError, match=words):
            source[index]
    skipped: list[Any] = []
    assert next_usable(source, 1, None, skipped).id == "q-train-4"
    assert [one.id for one in skipped] == ["q-train-2", "q-train-3"]
    with pytest.raises(TooManyBad):
        HubRecords(path, columns=COLUMNS, cache=cache, max_bad_fraction=0.1, verify=True)
    checked = HubRecords(path, columns=COLUMNS, cache=cache, max_bad_fraction=0.5, verify=True)
    assert len(checked) == 2 and [one.id for one in checked.skipped] == ["q-train-2", "q-train-3"]


def test_a_split_that_is_not_there_is_taken_out_of_train_by_image(datasets: Any, tmp_path: Path, cache: str) -> None:
    path = table(tmp_path / "q", [asked(n, width=n % 30 + 1) for n in range(90)])
    common = {"columns": COLUMNS, "cache": cache, "val_fraction": 0.2, "test_fraction": 0.2}
    sides = [HubRecords(path, split=split, **common) for split in ("train", "val", "test")]
    seen = [set(widths(side)) for side in sides]
    assert sum(map(len, sides)) == 90 and min(map(len, seen)) > 1
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]
    table(tmp_path / "q", [asked(0), asked(1)], "validation-00000-of-00001.parquet")
    assert [len(HubRecords(path, split=split, **common)) for split in ("val", None)] == [2, 92]
    assert len(HubRecords(path, split="test", splits={"test": "validation"}, **common)) == 2


def test_conversations_of_json_beside_images(datasets: Any, tmp_path: Path, cache: str) -> None:
    (tmp_path / "in.png").write_bytes(png(5))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    rows = [{"id": n, "image": name, "conversations": turns} for n, name in enumerate(("in.png", "../out.png"))]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    source = HubRecords(str(tmp_path / "talk.json"), cache=cache)
    assert widths([source[0]]) == [5] and source.turns(0)[0].answer == "A dog."
    with pytest.raises(DataError, match="leaves the image folder"):
        source[1]
    before = source_fingerprint(source)
    (tmp_path / "in.png").write_bytes(png(50))
    assert source_fingerprint(source) != before and before["image_files"] == 2


def test_messages_in_parts_with_the_images_beside_them(datasets: Any, tmp_path: Path, cache: str) -> None:
    asked_ = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    said = [{"type": "text", "text": "This."}]
    messages = [{"role": "user", "content": asked_}, {"role": "assistant", "content": said}]
    path = table(tmp_path / "m", [{"images": [{"bytes": png(4), "path": None}], "messages": messages}])
    source = HubRecords(path, cache=cache)
    assert source[0].turns[0].prompt == "<image>\nWhich?" and widths(source) == [4]


def test_captions_of_folders_of_images(datasets: Any, tmp_path: Path, cache: str) -> None:
    for name, width in (("cat", 3), ("dog", 4)):
        (tmp_path / "classes" / "train" / name).mkdir(parents=True)
        (tmp_path / "classes" / "train" / name / f"{name}.png").write_bytes(png(width))
    classes = HubRecords(str(tmp_path / "classes"), columns={"caption": "label"}, prompt="What is it?", cache=cache)
    assert [classes[i].turns[0].answer for i in range(2)] == ["cat", "dog"] and widths(classes) == [3, 4]
    told = tmp_path / "told"
    told.mkdir()
    (told / "a.png").write_bytes(png(7))
    line = {"file_name": "a.png", "caption": ["One.", "Another."]}
    (told / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    source = HubRecords(str(told), cache=cache)
    assert source[0].turns[0].references == ("One.", "Another.") and source[0].image_ids == ("a.png",)
    before = source_fingerprint(source)
    (told / "a.png").write_bytes(png(8))
    assert source_fingerprint(HubRecords(str(told), cache=cache)) != before


def test_a_folder_that_save_to_disk_wrote(datasets: Any, tmp_path: Path, cache: str) -> None:
    rows = {"image": [{"bytes": png(n), "path": None} for n in (2, 3)], "caption": ["Two.", "Three."]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "two"))
    one, two = HubRecords(str(tmp_path / "one")), HubRecords(str(tmp_path / "two"), split="test")
    assert widths(one) == [2, 3] and widths(two) == [3]
    assert source_fingerprint(one)["files"] != source_fingerprint(two)["files"]


def test_a_stream_gives_the_same_sample_for_a_number_from_wherever_it_comes(
    datasets: Any, tmp_path: Path, cache: str
) -> None:
    path = table(tmp_path / "q", [asked(n) for n in range(12)])
    whole = HubRecords(path, columns=COLUMNS, cache=cache)
    stream = HubStream(path, size=10, skip=2, buffer=3, columns=COLUMNS, cache=cache)
    wanted = [whole[i + 2].turns for i in range(10)]
    assert [stream[i].turns for i in range(10)] == wanted and stream.label(0) == "q-train-3"
    for place in (9, 0, 4, 2, 8, 3):
        assert stream[place].turns == wanted[place]
    assert HubStream(path, size=10, skip=2, buffer=3, columns=COLUMNS, cache=cache)[7].turns == wanted[7]
    other = HubStream(path, size=10, skip=1, buffer=3, columns=COLUMNS, cache=cache)
    assert source_fingerprint(other) != source_fingerprint(stream)
    with pytest.raises(UserError, match=r"only 12 rows in the split 'train'; set data\.size to 10 or less"):
        HubStream(path, size=20, skip=2, buffer=3, columns=COLUMNS, cache=cache)[11]


def test_a_stream_of_the_hub_needs_its_commit(
    datasets: Any, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "q", [asked(n) for n in range(3)])
    here = opened.open_set(path, cache=cache)
    there = opened.Opened("owner/name", here.splits, None, COMMIT, _builder=here._builder)
    monkeypatch.setattr("vlmlab.data.readers.hub_stream.open_set", lambda *_: there)
    with pytest.raises(UserError, match=f"set data.revision={COMMIT}"):
        HubStream("owner/name", size=2, columns=COLUMNS, revision="main")
    stream = HubStream("owner/name", size=2, columns=COLUMNS, revision=COMMIT)
    assert source_fingerprint(stream)["commit"] == COMMIT and stream[1].id == "owner/name-train-2"
    with pytest.raises(UserError, match="one of them is a stream, which is read in order"):
        NamedMixture({"a": {"weight": 1}, "b": 1}, {"a": stream, "b": stream}, weighted=False, cache=cache)


def test_a_mixture_by_name_and_weight(datasets: Any, tmp_path: Path, cache: str) -> None:
    first = table(tmp_path / "first", [{**asked(n), "image": None} for n in range(8)])
    (tmp_path / "words.jsonl").write_text(
        "".join(json.dumps({"image": "a", "caption": f"{n}"}) + "\n" for n in range(4))
    )
    parts = {"a": {"path": first, "columns": COLUMNS, "weight": 3}, str(tmp_path / "words.jsonl"): 1}
    mixed = NamedMixture(parts, size=16, cache=cache)
    assert Counter(mixed.turns(i)[0].kind for i in range(16)) == {"number": 12, "caption": 4}
    assert len(NamedMixture(parts, weighted=False, cache=cache)) == 12
    assert len(source_fingerprint(mixed)["sources"]) == 2
    with pytest.raises(UserError, match=r"data\.parts\.a\.pth is unknown; the keys are weight, path"):
        NamedMixture({"a": {"pth": first}}, cache=cache)
    with pytest.raises(UserError, match="needs parts"):
        NamedMixture({}, cache=cache)


def test_a_mixture_counts_as_read() -> None:
    node = composed("data=mix", "data.parts={owner/name: 2, world: 1}").data.train.instruct
    assert reads(node) and dict(node.parts) == {"owner/name": 2, "world": 1}


def test_the_choices_read_a_set(datasets: Any, tmp_path: Path, cache: str) -> None:
    path = table(tmp_path / "q", [asked(n) for n in range(40)])
    for choice in ("hub_captions", "hub_stream"):
        cfg = OmegaConf.create({"seed": 0, "data": composed(f"data={choice}").data})
        cfg.data.update({"path": path, "cache": cache, "size": 30, "held_out": 10, "val_fraction": 0.3})
        cfg.data.columns.update({"image": "picture", "caption": "query", "question": "query"})
        train, val = (instantiate(cfg.data[part].instruct) for part in ("train", "val"))
        names = [[source[i].image_ids[0] for i in range(len(source))] for source in (train, val)]
        assert not set(names[0]) & set(names[1]) and min(map(len, names)) >= 1
        for benchmark in cfg.data.benchmarks.values():
            test = instantiate(benchmark.source)
            assert not {test[i].image_ids[0] for i in range(len(test))} & set(names[0] + names[1])

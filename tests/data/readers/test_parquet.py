from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.data.overlap import same_bytes, stored_images
from vlmlab.data.readers import parquet
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.parquet import LlavaParquet, ParquetRows, VqaParquet, to_tar
from vlmlab.data.readers.tar import TarShards
from vlmlab.data.skipped import TooManyBad

pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (pip install 'vlmlab[parquet]')")
pq = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow (pip install 'vlmlab[parquet]')")

TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
RECAP = pa.schema([("id", pa.string()), ("image", IMAGE), ("conversations", pa.list_(TURN))])
NEXT = pa.schema(
    [("id", pa.string()), ("conversations", pa.list_(TURN)), ("data_source", pa.string()), ("image", IMAGE)]
)
VQA = pa.schema([("image", IMAGE), ("question", pa.string()), ("answer", pa.string())])


def png(width: int, height: int = 3) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width, 0, 0)).save(file, "png")
    return file.getvalue()


def talk(question: str, answer: str | None = "A dog.") -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def recap(number: int, **more: Any) -> dict[str, Any]:
    image = {"bytes": png(number + 1), "path": f"{number}.png"}
    return {"id": f"{number:04d}", "image": image, "conversations": talk("<image>\nDescribe."), **more}


def write(file: Path, rows: list[dict[str, Any]], schema: Any = RECAP, group: int = 3) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=group)
    return str(file)


def test_without_pyarrow_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for source in (LlavaParquet, VqaParquet):
        with pytest.raises(UserError, match=r"need the package pyarrow.* pip install 'vlmlab\[parquet\]'"):
            source("anything.parquet")


def test_rows_are_found_across_groups_and_shards(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [recap(n) for n in range(7)])
    write(tmp_path / "train-00001-of-00002.parquet", [recap(n) for n in range(7, 12)], group=2)
    source = LlavaParquet(str(tmp_path))
    widths = [source[i].images[0].shape[1] for i in (11, 0, 6, 7, 3, 11)]
    assert len(source) == 12 and widths == [12, 1, 7, 8, 4, 12]
    assert [source.label(i) for i in (0, 7)] == ["train-00000-of-00002-1", "train-00001-of-00002-1"]
    assert source[7].id == source.label(7) and source[7].image_ids == ("train-00001-of-00002-1#0",)
    turn = source[5].turns[0]
    assert (turn.prompt, turn.answer) == ("<image>\nDescribe.", "A dog.")
    assert source.turns(5) == source[5].turns
    again = copy.deepcopy(source)  # a worker that is spawned
    assert again[4].images[0].shape == source[4].images[0].shape
    assert len(LlavaParquet(str(tmp_path / "train-*1-of-00002.parquet"))) == 5


def test_the_instruction_set_has_texts_and_long_talks(tmp_path: Path) -> None:
    long = talk("Look <image> here") + talk("And?", "Yes.")
    rows = [
        {"id": "1", "conversations": long, "data_source": "a", "image": {"bytes": png(2), "path": None}},
        {"id": "2", "conversations": talk("Hi"), "data_source": "b", "image": None},
        {"id": "3", "conversations": talk("No tag"), "data_source": "b", "image": {"bytes": png(2), "path": None}},
        {"id": "4", "conversations": talk("<image>"), "data_source": "b", "image": None},
    ]
    source = LlavaParquet(write(tmp_path / "next.parquet", rows, NEXT))
    assert [len(source[i].turns) for i in (0, 1)] == [2, 1] and source[1].images == ()
    with pytest.raises(DataError, match=r"next.parquet, row 3: 0 image tags \(<image>\) for 1 images"):
        source[2]
    with pytest.raises(DataError, match=r"next.parquet, row 4: 1 image tags \(<image>\) for 0 images"):
        source[3]
    assert len(LlavaParquet(str(tmp_path / "next.parquet"), prepend_images=True)[2].images) == 1


def test_a_list_of_images(tmp_path: Path) -> None:
    schema = pa.schema([("images", pa.list_(IMAGE)), ("conversations", pa.list_(TURN))])
    images = [{"bytes": png(n), "path": None} for n in (1, 2)]
    path = write(tmp_path / "a.parquet", [{"images": images, "conversations": talk("<image> or <image>?")}], schema)
    assert [image.shape[1] for image in LlavaParquet(path)[0].images] == [1, 2]


def test_bad_pictures_are_named_and_paths_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "in.png").write_bytes(png(5))
    given = [
        {"bytes": png(9)[:40], "path": "cut.png"},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": "/etc/hostname"},
        {"bytes": None, "path": "in.png"},
    ]
    path = write(tmp_path / "a.parquet", [recap(n, image=image) for n, image in enumerate(given)])
    source = LlavaParquet(path, images=str(tmp_path / "images"))
    reasons = ["row 1: Image cut.png", "is empty", "neither bytes nor a path", "leaves the image folder", "an absolute"]
    for index, reason in enumerate(reasons):
        with pytest.raises(DataError) as caught:
            source[index]
        assert reason in str(caught.value) and f"a.parquet, row {index + 1}: " in str(caught.value)
    assert source[5].images[0].shape[1] == 5
    with pytest.raises(DataError, match=r"row 6: its image is only the path 'in.png'; set data\.images"):
        LlavaParquet(path)[5]
    with pytest.raises(TooManyBad) as found:
        LlavaParquet(path, images=str(tmp_path / "images"), max_bad_fraction=0.5, verify=True)
    assert [s.id for s in found.value.skipped] == [f"a-{n}" for n in range(1, 6)]
    sound = LlavaParquet(path, images=str(tmp_path / "images"), max_bad_fraction=0.9, verify=True)
    assert len(sound) == 1 and len(sound.skipped) == 5


def test_held_out_rows_share_no_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [recap(n % 50) for n in range(150)], group=40)
    train, val = (LlavaParquet(path, split=split, val_fraction=0.3) for split in ("train", "val"))
    rows = ParquetRows([Path(path)])
    ids = [{rows[int(i)].data["id"] for i in source._index} for source in (train, val)]
    assert len(train) + len(val) == 150 and len(val) > 10 and not ids[0] & ids[1]
    few = LlavaParquet(path, size=7, seed=1)
    assert len(few) == 7 and few.label(0) == LlavaParquet(path, size=7, seed=1).label(0)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a.parquet is not a readable parquet file"):
        LlavaParquet(str(tmp_path / "a.parquet"))
    path = write(tmp_path / "b.parquet", [{"image": None, "question": "?", "answer": "!"}], VQA)
    with pytest.raises(DataError, match=r"no column 'conversations' \(columns: image, question, answer\)"):
        LlavaParquet(path)
    with pytest.raises(DataError, match=r"no column 'question'"):
        VqaParquet(write(tmp_path / "c.parquet", [recap(0)]))
    with pytest.raises(DataError, match=r"a.parquet is not a readable parquet file"):
        LlavaParquet(str(tmp_path))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no file that ends in"):
        LlavaParquet(str(tmp_path / "nothing"))


def question(place: int, number: int, **more: Any) -> dict[str, Any]:
    picture = {"bytes": png(place + 1), "path": None}
    return {"image": picture, "question": f"q{place}.{number}?", "answer": "yes" if number % 2 else "red", **more}


def test_questions_by_the_files_splits_and_by_image(tmp_path: Path) -> None:
    write(tmp_path / "train-00000.parquet", [question(i, n) for i in range(20) for n in range(3)], VQA)
    write(tmp_path / "test-00000.parquet", [question(i, 0) for i in range(30, 35)], VQA)
    train, val, test = (VqaParquet(str(tmp_path), split=s, val_fraction=0.2) for s in ("train", "val", "test"))
    assert (len(test), len(train) + len(val)) == (5, 20) and len(val) >= 1  # one conversation per image
    widths = [{source[i].images[0].shape[1] for i in range(len(source))} for source in (train, val)]
    assert not widths[0] & widths[1] and all(len(train[i].turns) == 3 for i in range(len(train)))
    assert all(turn.prompt.startswith(f"q{train[0].images[0].shape[1] - 1}.") for turn in train[0].turns)
    single = VqaParquet(str(tmp_path), split="test", multi_turn=False, suffix="Short.")
    assert [single[i].id for i in (0, 4)] == ["test-00000-1", "test-00000-5"]
    assert (single[1].turns[0].prompt, single[1].turns[0].kind) == ("q31.0?\nShort.", "other")


def test_questions_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [question(n, 0) for n in range(5)]
    rows += [
        question(5, 0, image=None),
        question(6, 0, answer=None),
        question(7, 0, image={"bytes": b"x", "path": None}),
    ]
    path = write(tmp_path / "a.parquet", rows, VQA)
    with pytest.raises(DataError, match=r"a.parquet, row 6: 'image' is empty"):
        VqaParquet(path)
    source = VqaParquet(path, max_bad_fraction=0.5, verify=True)
    assert len(source) == 5 and [s.id for s in source.skipped] == ["a-6", "a-7", "a-8"]


def test_the_real_records_are_the_same_from_parquet(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "llava_records"
    records = json.loads((root / "llava_instruct_coco.json").read_text(encoding="utf-8"))
    kept = [r for r in records if (root / r["image"]).is_file()][:40]
    (tmp_path / "some.json").write_text(json.dumps(kept), encoding="utf-8")
    plain = LlavaJson(str(tmp_path / "some.json"), images=str(root))
    rows = [{**r, "image": {"bytes": (root / r["image"]).read_bytes(), "path": r["image"]}} for r in kept]
    packed = LlavaParquet(write(tmp_path / "train-0.parquet", rows, RECAP, group=16))
    assert len(plain) == len(packed) == 40
    for i in (0, 15, 16, 39):
        assert plain[i].turns == packed[i].turns and np.array_equal(plain[i].images[0], packed[i].images[0])


def test_the_same_samples_from_tar(tmp_path: Path) -> None:
    rows = [recap(n) for n in range(7)] + [recap(7, image=None, conversations=talk("Hi"))]
    path = write(tmp_path / "a.parquet", rows)
    assert [file.name for file in to_tar(path, tmp_path / "tar", rows=3)] == [f"train-{n:05d}.tar" for n in range(3)]
    plain, packed = LlavaParquet(path), TarShards(str(tmp_path / "tar"))
    assert len(plain) == len(packed) == 8
    for i in range(8):
        assert plain[i].turns == packed[i].turns and len(plain[i].images) == len(packed[i].images)
        assert all(np.array_equal(a, b) for a, b in zip(plain[i].images, packed[i].images, strict=True))


def test_no_number_is_no_value(tmp_path: Path) -> None:
    """A table of pandas has NaN, and numbers with a point, where a cell is empty."""
    schema = pa.schema([("image", IMAGE), ("question", pa.string()), ("answer", pa.float64()), ("id", pa.float64())])
    nan = float("nan")
    image = {"bytes": png(2), "path": None}
    rows = [{"image": image, "question": "q?", "answer": a, "id": i} for a, i in ((2.0, 1.0), (nan, 2.0), (3.0, nan))]
    path = write(tmp_path / "a.parquet", [*rows, {**rows[0], "answer": None, "id": 9.0}], schema)
    for row, key in ((2, "answer"), (3, "id"), (4, "answer")):
        with pytest.raises(TooManyBad) as caught:
            VqaParquet(path, id_key="id", max_bad_fraction=0.1)
        assert f"row {row}: '{key}' is null (or NaN)" in " ".join(s.reason for s in caught.value.skipped)
    kept = VqaParquet(path, id_key="id", max_bad_fraction=0.9, multi_turn=False)
    assert [(kept.label(0), kept.turns(0)[0].answer, len(kept))] == [("1.0", "2.0", 1)]
    numbers = pa.schema([("id", pa.float64()), ("image", IMAGE), ("conversations", pa.list_(TURN))])
    talks = [recap(n, id=i, conversations=talk("<image>", a)) for n, (i, a) in enumerate([(nan, "A"), (2.0, None)])]
    source = LlavaParquet(write(tmp_path / "b.parquet", talks, numbers))
    assert source[0].turns[0].answer == "A"
    with pytest.raises(DataError, match="row 2: turn 2 has no text"):
        source[1]
    assert [len(LlavaParquet(str(tmp_path / "b.parquet"), split=s, val_fraction=0.0)) for s in ("train",)] == [2]


def test_held_out_rows_share_no_path_of_an_image(tmp_path: Path) -> None:
    rows = [recap(n, image={"bytes": png(n % 40 + 1), "path": f"{'./' * (n % 3)}{n % 40}.png"}) for n in range(120)]
    path = write(tmp_path / "a.parquet", rows, group=50)
    train, val = (LlavaParquet(path, split=split, val_fraction=0.3) for split in ("train", "val"))
    widths = [{s[i].images[0].shape[1] for i in range(len(s))} for s in (train, val)]
    assert not widths[0] & widths[1] and len(train) + len(val) == 120 and len(widths[1]) > 3
    many = pa.schema([("images", pa.list_(IMAGE)), ("conversations", pa.list_(TURN))])
    pairs = [{"images": [r["image"], r["image"]], "conversations": talk("<image><image>")} for r in rows]
    write(tmp_path / "b.parquet", pairs, many)
    train, val = (LlavaParquet(str(tmp_path / "b.parquet"), split=s, val_fraction=0.3) for s in ("train", "val"))
    widths = [{s[i].images[0].shape[1] for i in range(len(s))} for s in (train, val)]
    assert not widths[0] & widths[1] and len(train) + len(val) == 120
    one = write(tmp_path / "c.parquet", [recap(n, image={"bytes": png(1), "path": "image.jpg"}) for n in range(60)])
    assert len(LlavaParquet(one, split="val", val_fraction=0.3)) > 6  # a path that all have says nothing


def test_deep_pixels_inside(tmp_path: Path) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(deep, "png")
    path = write(tmp_path / "a.parquet", [recap(0, image={"bytes": deep.getvalue(), "path": None})])
    assert [LlavaParquet(path, image_range=r)[0].images[0].max() for r in ("auto", [0, 4095])] == [16, 255]
    rows = [{"image": {"bytes": deep.getvalue(), "path": None}, "question": "q", "answer": "a"}]
    path = write(tmp_path / "b.parquet", rows, VQA)
    assert VqaParquet(path, image_range=[0, 4095])[0].images[0].max() == 255


def test_images_inside_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"train": (1, 2, 3, 4), "test": (9, 3, 8, 1)}
    for side, widths in sides.items():
        (tmp_path / side).mkdir()
        rows = [recap(n) | {"image": {"bytes": png(width), "path": None}} for n, width in enumerate(widths)]
        write(tmp_path / side / "a.parquet", rows, group=1)
        write(tmp_path / side / "q.parquet", [question(w - 1, n) for w in widths for n in range(2)], VQA, group=3)
    train, test = (stored_images(LlavaParquet(str(tmp_path / side / "a.parquet"))) for side in sides)
    assert same_bytes(train, test) == [("a-3#0", "a-2#0"), ("a-1#0", "a-4#0")]
    asked, again = (stored_images(VqaParquet(str(tmp_path / side / "q.parquet"))) for side in sides)
    assert len(asked) == 4 and same_bytes(asked, again) == [("q-5#0", "q-3#0"), ("q-1#0", "q-7#0")]
    (tmp_path / "file.png").write_bytes(png(2))
    write(tmp_path / "named.parquet", [recap(0) | {"image": {"bytes": None, "path": "file.png"}}])
    named = stored_images(LlavaParquet(str(tmp_path / "named.parquet"), images=str(tmp_path)))
    assert same_bytes(train, named) == [("a-2#0", "file.png")]
    monkeypatch.setattr(parquet, "COMPARED", 1)
    assert len(stored_images(LlavaParquet(str(tmp_path / "train" / "a.parquet")))) == 1  # of one row group

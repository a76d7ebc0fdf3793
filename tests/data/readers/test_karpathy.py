from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmlab.contracts.errors import DataError
from vlmlab.data.readers.karpathy import KarpathyCaptions

SPLITS = ["train", "restval", "val", "test", "test"]


def image(number: int, split: str, **more: Any) -> dict[str, Any]:
    sentences = [{"raw": f" caption {number}.{k} \n", "sentid": 10 * number + k, "tokens": []} for k in range(2)]
    return {"filename": f"{number}.png", "split": split, "imgid": number, "sentences": sentences, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    for n in range(5):
        Image.new("RGB", (n + 1, 3)).save(tmp_path / f"{n}.png")
        Image.new("RGB", (n + 1, 3)).save(tmp_path / "val2014" / f"{n}.png")
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]], name: str = "dataset_coco.json") -> str:
    (folder / name).write_text(json.dumps({"images": rows, "dataset": "coco"}), encoding="utf-8")
    return str(folder / name)


def test_coco_with_folders_and_restval(folder: Path) -> None:
    rows = [image(n, split, filepath="val2014", cocoid=100 + n) for n, split in enumerate(SPLITS)]
    path = write(folder, rows)
    sizes = [len(KarpathyCaptions(path, str(folder), split=split)) for split in ("train", "val", "test", None)]
    assert sizes == [4, 2, 4, 10]
    assert len(KarpathyCaptions(path, str(folder), split="train", restval=False)) == 2
    test = KarpathyCaptions(path, str(folder), split="test", all_references=True, prompt="Say.")
    sample = test[1]
    assert (sample.id, sample.image_ids, sample.images[0].shape) == ("104", ("val2014/4.png",), (3, 5, 3))
    assert sample.turns[0].references == ("caption 4.0", "caption 4.1") and sample.turns[0].prompt == "Say."
    assert KarpathyCaptions(path, str(folder), split="val")[1].id == "21"


def test_flickr_as_json_and_as_tables(folder: Path) -> None:
    rows = [image(n, split) for n, split in enumerate(["train", "train", "val", "test", "test"])]
    plain = KarpathyCaptions(write(folder, rows, "dataset_flickr30k.json"), str(folder), split="test")
    lines = ["raw,sentids,split,filename,img_id"]
    for row in rows:
        quoted = json.dumps([s["raw"].strip() for s in row["sentences"]]).replace('"', '""')
        ids = json.dumps([s["sentid"] for s in row["sentences"]])
        lines.append(f'"{quoted}","{ids}",{row["split"]},{row["filename"]},{row["imgid"]}')
    (folder / "flickr_annotations_30k.csv").write_text("\n".join(lines))
    table = KarpathyCaptions(str(folder / "flickr_annotations_30k.csv"), str(folder), split="test")
    same = [(plain[i].id, plain[i].turns) == (table[i].id, table[i].turns) for i in range(len(plain))]
    assert same == [True] * 4
    piped = ["image_name| comment_number| comment"]
    piped += [f'{n}.png| {k}| A "dog", {n}.{k} .' for n in range(5) for k in range(2)]
    (folder / "results.csv").write_text("\n".join(piped))
    results = KarpathyCaptions(str(folder / "results.csv"), str(folder), all_references=True)
    assert len(results) == 5 and results[3].turns[0].references == ('A "dog", 3.0 .', 'A "dog", 3.1 .')
    (folder / "a.token").write_text("\n".join(f"{n}.png#{k}\tA dog {n}.{k} ." for n in range(5) for k in range(2)))
    token = KarpathyCaptions(str(folder / "a.token"), str(folder))
    assert len(token) == 10 and (token[1].id, token[1].turns[0].answer) == ("0.png#1", "A dog 0.1 .")
    with pytest.raises(DataError, match="has the columns a, b; it needs raw and filename"):
        (folder / "x.csv").write_text("a,b\n1,2")
        KarpathyCaptions(str(folder / "x.csv"), str(folder))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"filepath": ".."}, "leaves the image folder"),
        ({"filename": "/etc/hostname"}, "is an absolute path"),
        ({"filename": "gone.png"}, "is not in"),
        ({"sentences": []}, "is not a list of captions"),
        ({"sentences": [{"raw": " "}]}, "'raw of sentence 1' is empty"),
        ({"sentences": ["x"]}, "sentence 1 is not an object"),
    ],
    ids=str,
)
def test_bad_rows_are_named_or_skipped(folder: Path, more: dict[str, Any], reason: str) -> None:
    path = write(folder, [image(0, "train"), image(1, "train", **more), image(2, "train")])
    with pytest.raises(DataError) as caught:
        KarpathyCaptions(path, str(folder))
    assert reason in str(caught.value) and "dataset_coco.json, row 2: " in str(caught.value)
    source = KarpathyCaptions(path, str(folder), max_bad_fraction=0.4)
    assert len(source) == 4 and reason in source.skipped[0].reason


def test_real_captions_in_this_form(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "coco_captions_mini"
    content = json.loads((root / "captions.json").read_text(encoding="utf-8"))
    captions: dict[int, list[dict[str, Any]]] = {}
    for row in content["annotations"]:
        captions.setdefault(row["image_id"], []).append({"raw": row["caption"], "sentid": row["id"]})
    rows = [
        {"filename": i["file_name"], "cocoid": i["id"], "split": ("train", "restval", "val", "test")[n % 4],
         "sentences": captions[i["id"]]}
        for n, i in enumerate(content["images"])
    ]  # fmt: skip
    images = root if (root / rows[0]["filename"]).is_file() else root / "images"
    path = write(tmp_path, rows)
    parts = [KarpathyCaptions(path, str(images), split=s, all_references=True) for s in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(rows) and len(parts[0]) > len(parts[1]) > 0
    assert len(parts[2][0].turns[0].references) >= 5 and parts[2][0].images[0].ndim == 3

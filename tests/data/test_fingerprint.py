from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from vlmlab.contracts.sample import Sample
from vlmlab.data import fingerprint, images
from vlmlab.data.fingerprint import data_fingerprint, source_fingerprint, train_fingerprint
from vlmlab.data.mixture import Mixture
from vlmlab.data.readers.coco_captions import CocoCaptions
from vlmlab.data.readers.karpathy import KarpathyCaptions
from vlmlab.data.readers.llava import LlavaJson
from vlmlab.data.readers.tar import TarShards, write_shard
from vlmlab.data.readers.vqa import VqaJson
from vlmlab.data.skipped import Replaced
from vlmlab.data.world.sources import WorldCaptions

WORLD = "vlmlab.data.world.sources.WorldCaptions"
VQA = "vlmlab.data.readers.vqa.VqaJson"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / name)
    vqa = [{"question_id": n, "image": f"{'ab'[n % 2]}.png", "question": "which?", "answer": "yes"} for n in range(4)]
    (tmp_path / "vqa.json").write_text(json.dumps(vqa))
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": talk}]))
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "yes"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    karpathy = {"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": "yes"}]}]}
    (tmp_path / "karpathy.json").write_text(json.dumps(karpathy))
    return tmp_path


def opened(folder: Path) -> dict[str, Any]:
    return {
        "vqa": VqaJson(str(folder / "vqa.json")),
        "llava": LlavaJson(str(folder / "llava.json")),
        "coco": CocoCaptions(str(folder / "coco.json"), str(folder)),
        "karpathy": KarpathyCaptions(str(folder / "karpathy.json"), str(folder)),
    }


@pytest.mark.parametrize("kind", ["vqa", "llava", "coco", "karpathy"])
def test_of_files_it_changes_with_annotations_and_images(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images.Pillow, "open", None)  # no image is opened
    before = source_fingerprint(opened(folder)[kind])
    assert before == source_fingerprint(opened(folder)[kind]) == json.loads(json.dumps(before))
    assert before["rows"] == len(opened(folder)[kind]) and before["images"] == "size and time"
    file = folder / f"{kind}.json"
    file.write_text(file.read_text().replace("yes", "nay"))  # of the same length
    os.utime(file, (1, 1))
    changed = source_fingerprint(opened(folder)[kind])
    assert {key for key in before if before[key] != changed[key]} == {"files"}
    os.utime(folder / "a.png", (1, 1))  # written again with other pixels
    touched = source_fingerprint(opened(folder)[kind])
    assert {key for key in before if touched[key] != changed[key]} == {"image_facts"}


def test_only_images_that_are_used_count(folder: Path) -> None:
    before = source_fingerprint(opened(folder)["coco"])
    os.utime(folder / "b.png", (1, 1))
    assert source_fingerprint(opened(folder)["coco"]) == before


def test_shards_by_content_or_where_they_are_large_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "png")

    def written(caption: str) -> dict[str, Any]:
        write_shard(tmp_path / "train.tar", [("1.png", file.getvalue()), ("1.txt", caption.encode())])
        return source_fingerprint(TarShards(str(tmp_path)))

    first = written("a dog")
    assert first["images"] == "content" and first == written("a dog") != written("a cat")
    monkeypatch.setattr(fingerprint, "HASHED", 100)
    large = written("a dog")
    assert large["images"] == "size and time" and large != first


def test_parquet_rows_that_name_image_files(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    from vlmlab.data.readers.parquet import LlavaParquet

    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    rows = [{"image": {"bytes": None, "path": "a.png"}, "conversations": talk}, {"image": None, "conversations": talk}]
    for name, kind, given in (
        ("one", image, rows),
        ("many", pa.list_(image), [{**row, "image": [row["image"]] if row["image"] else None} for row in rows]),
    ):
        table = pa.Table.from_pylist(given, pa.schema([("image", kind), ("conversations", turns)]))
        pq.write_table(table, folder / f"{name}.parquet")
        os.utime(folder / "a.png", (2, 2))
        before = source_fingerprint(LlavaParquet(str(folder / f"{name}.parquet"), str(folder)))
        assert before["image_files"] == 1
        os.utime(folder / "a.png", (1, 1))
        assert source_fingerprint(LlavaParquet(str(folder / f"{name}.parquet"), str(folder))) != before


def test_what_is_generated_is_its_class_and_arguments() -> None:
    facts = source_fingerprint(WorldCaptions("short", "train", 9, seed=3))
    assert facts == {
        "source": WORLD, "rows": 9, "style": "short", "split": "train", "size": 9, "seed": 3, "domain": "base",
        "grid": 4, "objects": [1, 5],
    }  # fmt: skip


def test_wrappers_ask_what_they_hold(folder: Path) -> None:
    file = opened(folder)["vqa"]
    mixed = Mixture([file, WorldCaptions("short", "train", 9)])
    facts = source_fingerprint(mixed)
    assert facts["sources"] == [source_fingerprint(source) for source in mixed.sources]
    assert facts != source_fingerprint(Mixture(mixed.sources, seed=1)) and facts["rows"] == len(mixed)
    assert source_fingerprint(Replaced(file)) == source_fingerprint(file)


def test_a_source_of_ones_own_needs_nothing() -> None:
    class Own:
        def __init__(self) -> None:
            self.seed, self._hidden, self.tensor = 1, 2, object()

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Sample:
            raise AssertionError("no sample is loaded")

    facts = source_fingerprint(Own())
    assert facts["rows"] == 5 and facts["seed"] == 1 and set(facts) == {"source", "rows", "seed"}


def test_of_a_configuration_those_that_the_run_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.Pillow, "open", None)  # `verify` would open all
    file = {"_target_": VQA, "path": str(folder / "vqa.json"), "val_fraction": 0.0, "test_fraction": 0.0}
    world = {"_target_": WORLD, "style": "short", "split": "train", "size": 9}
    cfg = OmegaConf.create(
        {
            "data": {
                "train": {"short": world, "instruct": file, "unused": {"_target_": VQA, "path": "missing.json"}},
                "val": {"short": {**world, "split": "val"}, "unused": {"_target_": VQA, "path": "missing.json"}},
                "benchmarks": {"test": {"source": {**file, "multi_turn": False, "verify": True}, "metrics": []}},
            },
            "recipe": {"stages": {"align": {"data": "short"}, "tune": {"data": "instruct"}}},
        }
    )
    facts = data_fingerprint(cfg)
    assert {part: list(group) for part, group in facts.items()} == {
        "train": ["short", "instruct"], "val": ["short"], "benchmarks": ["test"],
    }  # fmt: skip
    assert facts["benchmarks"]["test"]["rows"] == 4 and facts["val"]["short"]["split"] == "val"
    assert facts["train"]["instruct"] == train_fingerprint(cfg, "instruct")
    assert data_fingerprint(cfg) == facts

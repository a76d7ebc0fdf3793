"""Every file of conf/data that reads real data, on real data rewritten into the set's own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tests.test_conf import composed


def group(name: str, **keys: Any) -> DictConfig:
    made = OmegaConf.create({"seed": 0, "data": composed(f"data={name}").data})
    made.data.update(keys)
    return made.data


@pytest.mark.parametrize(("name", "rows"), [("vqa_rad", 1790), ("slake", 4486)])
def test_radiology_questions(shared_data: Path, name: str, rows: int) -> None:
    root = shared_data / name
    data = group(name, path=str(root / "vqa.json"), images=str(root))
    train, val = (instantiate(data[part].instruct) for part in ("train", "val"))
    test = instantiate(data.benchmarks[f"{name}_test"].source)
    asked = [sum(len(turns) for _, turns in source._groups) for source in (train, val)]
    assert sum(asked) + len(test) + len(train.skipped) + len(test.skipped) == rows and min(asked) > 50
    assert {test[i].turns[0].kind for i in range(0, len(test), 17)} == {"open", "closed"}


@pytest.mark.parametrize("name", ["llava_recap_558k", "llava_recap_118k", "llava_next"])
def test_the_papers_sets(shared_data: Path, name: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (pip install 'vlmlab[parquet]')")
    pq = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow")
    root = shared_data / "llava_records"
    records = json.loads((root / "llava_instruct_coco.json").read_text(encoding="utf-8"))
    rows = [r for r in records if (root / r["image"]).is_file()][:60]
    rows = [{**r, "image": {"bytes": (root / r["image"]).read_bytes(), "path": None}} for r in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet", row_group_size=20)
    known = list(composed(f"data={name}").data)
    keys = {key: str(tmp_path) for key in ("path", "path_558k", "path_118k") if key in known}
    data = group(name, val_fraction=0.2, **keys)
    for stage in ("short", "dense", "captions", "instruct"):
        train, val = (instantiate(data[part][stage]) for part in ("train", "val"))
        total = len(train) + len(val)
        assert total == (120 if name == "llava_next" and stage == "captions" else 60) and len(val) > 1
        assert train[0].images[0].ndim == 3 and train[0].turns[0].answer

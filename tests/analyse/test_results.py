"""Run folders are read whatever state they are in."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from vlmlab.analyse.results import MetricKey, parse_overrides, read_run, read_sweep
from vlmlab.runs.lock import FolderLock


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("quiz/vqa_accuracy", MetricKey("quiz", "vqa_accuracy")),
        ("quiz/vqa_accuracy/count", MetricKey("quiz", "vqa_accuracy/count")),
        ("quiz/vqa_accuracy/shuffled", MetricKey("quiz", "vqa_accuracy", baseline="shuffled")),
        ("quiz/vqa_accuracy/kind/count", MetricKey("quiz", "vqa_accuracy", "count")),
        ("quiz/vqa_accuracy/kind/a/b/no_image", MetricKey("quiz", "vqa_accuracy", "a/b", "no_image")),
        ("quiz/chance/kind/shuffled", MetricKey("quiz", "chance", "shuffled")),
        ("quiz/vqa_accuracy/kind/a/lookup", MetricKey("quiz", "vqa_accuracy", "a", "lookup")),
        ("quiz/vqa_accuracy/new/lookup", MetricKey("quiz", "vqa_accuracy/new", baseline="lookup")),
        ("quiz/floor/lookup", MetricKey("quiz", "floor/lookup")),
        ("quiz/floor/shuffled/kind/a", MetricKey("quiz", "floor/shuffled", "a")),
        ("tales/human/cider_d", MetricKey("tales", "human/cider_d")),
        ("loss", MetricKey("loss", "")),
    ],
)
def test_metric_names(name: str, key: MetricKey) -> None:
    assert MetricKey.parse(name) == key
    if key.score:
        assert str(key) == name


def test_parse_overrides() -> None:
    assert parse_overrides(["connector=mlp", "+a.b=x=1", "~mask", "c="]) == {
        "connector": "mlp",
        "a.b": "x=1",
        "mask": "(removed)",
        "c": "(removed)",
    }


@pytest.mark.parametrize(
    ("files", "state", "reason"),
    [
        ({"result": {"metrics": {"a/b": 1, "a/c": "x", "a/d": True}}}, "done", ""),
        ({"result": '{"format'}, "failed", "cannot be read"),
        ({"result": "[]"}, "failed", "cannot be read"),
        ({"result": {"metrics": []}}, "failed", "holds no metrics"),
        ({"result": {"metrics": {"a/b": 1}, "failed": {"c": "too long"}}}, "failed", "c: too long"),
        ({"state": {"state": "failed", "error": "UserError: too\n  hot"}}, "failed", "UserError: too hot"),
        ({"state": {"state": "failed", "stage": "align", "step": 3}}, "failed", "stage align step 3"),
        ({"state": {"state": "running", "stage": "align", "step": 3}}, "interrupted", "stopped in stage align step 3"),
        ({"state": {"state": "interrupted"}}, "interrupted", "ended without a result"),
        ({"state": {"state": "done"}}, "failed", "done without a result.json"),
        ({"state": "not json"}, "not started", ""),
        ({}, "not started", ""),
    ],
)
def test_states(tmp_path: Path, cells: ModuleType, files: dict[str, object], state: str, reason: str) -> None:
    record = read_run(cells.write_cell(tmp_path, "connector=mlp", **files))
    assert record.state == state
    assert reason in record.reason
    assert record.metrics == ({"a/b": 1.0} if state == "done" else {})


def test_a_locked_folder_is_running(tmp_path: Path, cells: ModuleType) -> None:
    folder = cells.write_cell(tmp_path, "seed=1", state={"state": "running", "stage": "dense", "step": 7})
    lock = FolderLock(folder)
    lock.acquire()
    try:
        assert (read_run(folder).state, read_run(folder).reason) == ("running", "stage dense step 7")
    finally:
        lock.release()
    assert read_run(folder).state == "interrupted"


def test_overrides_come_from_whichever_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"overrides": ["a=2"], "metrics": {"b/c": 1}}))
    (tmp_path / "env.json").write_text(json.dumps({"overrides": ["a=3"]}))
    (tmp_path / "overrides.json").write_text("{broken")
    assert read_run(tmp_path).overrides == {"a": "2"}
    (tmp_path / "overrides.json").write_text('["a=1"]')
    assert read_run(tmp_path).overrides == {"a": "1"}
    (tmp_path / "overrides.json").unlink()
    (tmp_path / "result.json").unlink()
    assert read_run(tmp_path).overrides == {"a": "3"}


def test_results_of_other_code_are_marked(tmp_path: Path, cells: ModuleType) -> None:
    old = cells.write_cell(tmp_path, "seed=1", result=cells.result(0.5), env={"codes": ["0123456789abcdef"]})
    assert read_run(old).stale
    assert not read_run(cells.write_cell(tmp_path, "seed=2", result=cells.result(0.5))).stale


def test_cells_of_a_sweep(tmp_path: Path, cells: ModuleType) -> None:
    cells.write_cell(tmp_path, "seed=1")
    cells.write_cell(tmp_path, "seed=0")
    (tmp_path / "seed-0.old-1").mkdir()
    (tmp_path / "seed-0.old-1" / "state.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "table.csv").write_text("")
    assert [record.folder.name for record in read_sweep(tmp_path)] == ["seed-0", "seed-1"]
    assert read_sweep(tmp_path / "nowhere") == []

"""A run that was made before classes moved is read, reused and compared as if it had been made now."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmlab.contracts.errors import UserError
from vlmlab.runs.config import config_hash
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.renamed import MOVED, present_name, with_present_names

ROOT = Path(__file__).resolve().parents[2]

OLD = """
seed: 3
data:
  train:
    captions: {_target_: vlmlab.data.world.sources.WorldCaptions, style: short}
    mixed:
      _target_: vlmlab.data.mixture.Mixture
      sources:
      - {_target_: vlmlab.data.llava.LlavaJson, path: a.json}
      - {_target_: vlmlab.data.parquet.VqaParquet, path: vlmlab.data.parquet}
recipe:
  stages:
    align: {module: vlmlab.recipe.alignment.AlignmentModule, steps: 2}
    instruct: {module: vlmlab.recipe.instruction.InstructionTuningModule, steps: 2}
  finish: {_target_: vlmlab.train.towers.ExportTowers, vision_stage: align}
"""
"""A ``config.yaml`` as it was written before the move."""

NOW = """
seed: 3
data:
  train:
    captions: {_target_: vlmlab.data.world.sources.WorldCaptions, style: short}
    mixed:
      _target_: vlmlab.data.mixture.Mixture
      sources:
      - {_target_: vlmlab.data.readers.llava.LlavaJson, path: a.json}
      - {_target_: vlmlab.data.readers.parquet.VqaParquet, path: vlmlab.data.parquet}
recipe:
  stages:
    align: {module: vlmlab.engine.alignment.AlignmentModule, steps: 2}
    instruct: {module: vlmlab.engine.instruction.InstructionTuningModule, steps: 2}
  finish: {_target_: vlmlab.towers.rebuild.ExportTowers, vision_stage: align}
"""

NAMED = (
    "vlmlab.recipe.base.StageModule",
    "vlmlab.recipe.alignment.AlignmentModule",
    "vlmlab.recipe.instruction.InstructionTuningModule",
    "vlmlab.recipe.contrastive.ContrastiveModule",
    "vlmlab.engine.text_tower.ScratchTextTower",
    "vlmlab.train.towers.ExportTowers",
    "vlmlab.data.llava.LlavaJson",
    "vlmlab.data.vqa.VqaJson",
    "vlmlab.data.coco_captions.CocoCaptions",
    "vlmlab.data.karpathy.KarpathyCaptions",
    "vlmlab.data.parquet.LlavaParquet",
    "vlmlab.data.parquet.VqaParquet",
    "vlmlab.data.tar.TarShards",
)
"""Every class that has moved and that a shipped configuration named, or a user's own could."""


def now() -> dict[str, Any]:
    return yaml.safe_load(NOW)


def old_run(folder: Path, done: bool) -> RunFolder:
    (folder / "config.yaml").write_text(OLD, encoding="utf-8")
    if done:
        result = {"format": 1, "config_hash": config_hash(yaml.safe_load(OLD)), "metrics": {"x/vqa_accuracy": 0.5}}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return RunFolder(folder)


def test_a_finished_run_has_the_present_names(tmp_path: Path) -> None:
    assert old_run(tmp_path, done=True).finished() == now()


def test_the_same_command_gives_its_result(tmp_path: Path) -> None:
    with old_run(tmp_path, done=True) as run:
        result = run.open(now())
    assert result is not None and result["metrics"] == {"x/vqa_accuracy": 0.5}


def test_the_same_command_goes_on_with_an_unfinished_one(tmp_path: Path) -> None:
    with old_run(tmp_path, done=False) as run:
        assert run.open(now()) is None
        assert run.finish({}, {})["config_hash"] == config_hash(now())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == now()


def test_another_configuration_is_refused_for_what_differs_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another configuration \(seed: 3 -> 4\);"):
        old_run(tmp_path, done=True).open({**now(), "seed": 4})


@pytest.mark.parametrize("name", NAMED)
def test_what_has_moved_is_found_by_its_present_name(name: str) -> None:
    module, _, kind = present_name(name).rpartition(".")
    assert f"class {kind}(" in _source(module) or f"class {kind}:" in _source(module)
    before = name.rpartition(".")[0]
    assert before in MOVED
    if _path(before).exists():  # readers can still be imported from there
        assert "class " not in _source(before)
        assert getattr(importlib.import_module(before), kind) is getattr(importlib.import_module(module), kind)


def test_every_moved_module_is_there_and_no_present_name_moves() -> None:
    assert {name.rpartition(".")[0] for name in NAMED} == set(MOVED)
    assert all(importlib.util.find_spec(module) for module in MOVED.values())
    assert with_present_names(now()) == now()


def test_no_shipped_configuration_has_an_old_name() -> None:
    for path in (ROOT / "conf").rglob("*.yaml"):
        words = path.read_text(encoding="utf-8").replace(",", " ").replace("}", " ").split()
        assert not [word for word in words if present_name(word) != word], path


def _path(module: str) -> Path:
    return ROOT / "src" / Path(*module.split(".")).with_suffix(".py")


def _source(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")

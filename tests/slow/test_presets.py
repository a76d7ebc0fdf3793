"""Every published system that ships trains and answers on the embedded world: two steps a stage, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tests.test_conf import CONF, composed
from vlmlab.adapter.share import share
from vlmlab.cli.rules import check
from vlmlab.evaluate.run import evaluate_model
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train import proof
from vlmlab.train.run import train

pytestmark = pytest.mark.slow
PRESETS = sorted(path.stem for path in (CONF / "preset").glob("*.yaml") if path.stem != "none")
TOWERS = ("encoder", "lm")
FEW = ("budget=test", "precision=fp32", "trainer.progress=false", "evaluation.baselines=[]", "evaluation.held_out=[]")
MOST = 0.05
"""Share of all weights that an adapter may train."""


def small(preset: str) -> DictConfig:
    """Two steps of eight samples a stage, and the first benchmark's first answers."""
    cfg = composed(f"preset={preset}", *FEW)
    OmegaConf.set_struct(cfg, False)
    for stage in cfg.recipe.stages.values():
        stage.batch_size = 8
    cfg.data.benchmarks = dict([next(iter(cfg.data.benchmarks.items()))])
    return cfg


def frozen_towers(cfg: DictConfig, adapted: tuple[str, ...]) -> Iterator[str]:
    """Towers whose own weights no stage trains."""
    for part in TOWERS:
        trains = [stage for stage in cfg.recipe.stages.values() if (stage.train or {}).get(part) is not None]
        if all(stage.adapter and part in adapted for stage in trains):
            yield part


def bits(module: nn.Module) -> set[str]:
    return {proof.fingerprint(parameter) for parameter in module.parameters()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_answers(preset: str, tmp_path: Path) -> None:
    cfg = small(preset)
    config = plain(cfg)
    check(cfg, config, {"preset": preset})
    seen: dict[str, Any] = {}

    def evaluate(model: Any, cfg: DictConfig, folder: Path) -> dict[str, Any]:
        adapted = tuple(cfg.adapter.get("parts") or ())
        seen["shares"] = {part: share(model, (part,))["share"] for part in adapted}
        seen["moved"] = {part: bits(instantiate(cfg[part])) - bits(getattr(model, part)) for part in TOWERS}
        seen["frozen"] = set(frozen_towers(cfg, adapted))
        return evaluate_model(model, cfg, folder)

    with RunFolder(tmp_path) as run:
        run.open(config)
        result = train(cfg, tmp_path, evaluate)
    assert result is not None
    assert result["metrics"]["world_test/vqa_accuracy/count"] == 8
    assert sum(seen["shares"].values()) < MOST, seen["shares"]
    for part in TOWERS:  # beside the proof in train(): against the files on disk
        if part in seen["frozen"] and cfg[part]._target_ != "vlmlab.encoder.patch.PatchEncoder":
            assert not seen["moved"][part], part
        elif part not in seen["frozen"]:
            assert seen["moved"][part] or part not in result_parts(cfg), part
    print(preset, "shares", seen["shares"], "frozen", sorted(seen["frozen"]), "trainable", result["cost"])


def result_parts(cfg: DictConfig) -> set[str]:
    """Parts that a stage with a learning rate above 0 names."""
    return {part for stage in cfg.recipe.stages.values() for part, rate in stage.train.items() if rate}


def test_the_presets_of_the_plan_are_there() -> None:
    assert len(PRESETS) >= 18

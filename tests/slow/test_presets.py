"""Every published system that ships trains and answers on the embedded world: two steps a stage, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tests.test_conf import CONF, composed
from vlmlab.adapter.share import share
from vlmlab.cli.rules import check
from vlmlab.engine import proof
from vlmlab.evaluate.run import evaluate_model
from vlmlab.recipe.preset import deviations
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train

pytestmark = pytest.mark.slow
# systems at real size bring an LM of the hub; tests/preset builds those
SMALL = [path for path in (CONF / "preset").glob("*.yaml") if "override /lm:" not in path.read_text()]
PRESETS = sorted(path.stem for path in SMALL if path.stem != "none")
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


def moved(cfg: DictConfig, model: Any, part: str) -> bool:
    """Whether any weight of the tower on disk is no longer in the trained model."""
    source = proof.fingerprints(instantiate(cfg[part]).named_parameters())
    return not set(source.values()) <= set(proof.fingerprints(getattr(model, part).named_parameters()).values())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_answers(preset: str, tmp_path: Path) -> None:
    cfg = small(preset)
    config = plain(cfg)
    check(cfg, config, {"preset": preset})
    seen: dict[str, Any] = {}

    def evaluate(model: Any, cfg: DictConfig, folder: Path) -> dict[str, Any]:
        adapted = tuple(cfg.adapter.get("parts") or ())
        seen["share"] = sum(share(model, (part,))["share"] for part in adapted)
        seen["moved"] = {part: moved(cfg, model, part) for part in model.sourced()}
        seen["frozen"] = {part for part in frozen_towers(cfg, adapted) if part in model.sourced()}
        return evaluate_model(model, cfg, folder)

    with RunFolder(tmp_path) as run:
        run.open(config)
        result = train(cfg, tmp_path, evaluate)
    assert result is not None
    assert result["metrics"]["world_test/vqa_accuracy/count"] == 8
    assert [note for note in result.get("notes", []) if "deviates" in note] == deviations(cfg)
    assert seen["share"] < MOST
    for part, changed in seen["moved"].items():  # beside the proof in train(): against the files on disk
        assert changed == (part not in seen["frozen"]), part


def test_the_presets_of_the_plan_are_there() -> None:
    assert len(PRESETS) >= 18

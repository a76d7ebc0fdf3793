from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules import SIGLIP, check
from vlmlab.runs.config import plain

GOOD: dict[str, Any] = {
    "seed": 0,
    "precision": {"name": "auto"},
    "trainer": {"devices": 1, "accelerator": "auto", "threads": 1, "workers": 0, "save_every_s": 30},
    "budget": {"steps_scale": 1.0, "max_steps": None, "eval_limit": None},
    "mask": {"_target_": "vlmlab.mask.bidir.Bidirectional"},
    "data": {"train": {"short": {"_target_": "x.Y", "path": None}}},
    "objective": {"_target_": "vlmlab.objective.lm.LanguageModelling"},
    "recipe": {
        "stages": {
            "align": {"module": "a.B", "train": {"connector": 1e-3}, "data": "short", "steps": 1, "batch_size": 4},
            "tune": {"module": "a.B", "train": {"lm": 1e-3}, "data": "short", "steps": 1, "batch_size": 4},
        }
    },
}
CHOICES = {"fusion": "concat", "mask": "bidir", "hydra/launcher": "pool", "_mode": "RUN"}


def refused(changes: dict[str, Any], choices: dict[str, Any] | None = None) -> str:
    cfg = OmegaConf.create(copy.deepcopy(GOOD))
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ConfigError) as caught:
        check(cfg, plain(cfg), CHOICES | (choices or {}))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_good_composition_passes() -> None:
    cfg = OmegaConf.create(GOOD)
    check(cfg, plain(cfg), CHOICES)
    check(cfg, plain(cfg), CHOICES | {"fusion": "none"})  # the LM still learns


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision.name": "fp8"}, "precision.name=fp8"),
        ({"precision.name": "fp16", "trainer.accelerator": "cpu"}, "needs a GPU"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"trainer.threads": 0}, "trainer.threads=0"),
        ({"trainer.workers": -1}, "trainer.workers=-1"),
        ({"budget.steps_scale": 0}, "budget.steps_scale=0"),
        ({"budget.eval_limit": 0}, "budget.eval_limit=0"),
        ({"mask._target_": "vlmlab.mask.visual_rows_open.VisualRowsOpen"}, "visual_rows_open leaks"),
        ({"recipe.stages.tune.mask": {"_target_": "vlmlab.mask.visual_rows_open.X"}}, "recipe.stages.tune.mask="),
        ({"data.train.short.path": "/no/such"}, "data.train.short.path=/no/such does not exist"),
        ({"recipe.stages.align.train": {"brain": 1e-3}}, "brain"),
        ({"recipe.stages.align.data": "shrot"}, "recipe.stages.align.data=shrot"),
        ({"recipe.stages.align.steps": -1}, "recipe.stages.align.steps=-1"),
        ({"recipe.stages.align.batch_size": 0}, "recipe.stages.align.batch_size=0"),
        ({"objective": {"_target_": SIGLIP}, "recipe.stages.tune.accumulate": 2}, "recipe.stages.tune.accumulate=2"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(changes: dict[str, Any], words: str) -> None:
    assert words in refused(changes)


def test_a_contrastive_objective_among_several_is_found() -> None:
    several = {"lm": {"_target_": "a.B"}, "pair": {"_target_": SIGLIP}}
    assert "accumulate=4" in refused({"recipe.stages.align.objective": several, "recipe.stages.align.accumulate": 4})


def test_no_vision_and_no_lm_trained_is_nothing_to_train() -> None:
    assert "fusion=none" in refused({"recipe.stages.tune.train": {"connector": 1e-3}}, {"fusion": "none"})


def test_ranks_cannot_be_swept_by_the_basic_launcher() -> None:
    cfg = OmegaConf.create(copy.deepcopy(GOOD))
    cfg.trainer.devices = 2
    basic = {"hydra/launcher": "basic", "_mode": "MULTIRUN"}
    assert "hydra/launcher=pool" in refused({"trainer.devices": 2}, basic)
    check(cfg, plain(cfg), CHOICES | {"hydra/launcher": "basic"})


def test_a_file_that_is_there_passes(tmp_path: Path) -> None:
    cfg = OmegaConf.create(copy.deepcopy(GOOD))
    cfg.data.train.short.path = str(tmp_path)
    check(cfg, plain(cfg), CHOICES)

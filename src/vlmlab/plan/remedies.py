"""What helps a training step that found no memory: keys, and what the plan says each of them would need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import LONGEST, OutOfMemory, listed
from vlmlab.engine.precision import choose, on_gpu
from vlmlab.engine.shards import FSDP2
from vlmlab.engine.weights import build_objectives
from vlmlab.plan.devices import DEVICES
from vlmlab.plan.plan import Settings, StagePlan, plan
from vlmlab.recipe.stage import Stage, parse

CHECKPOINTING = ("lm.gradient_checkpointing", "encoder.gradient_checkpointing")
SHOWN = 2
"""How many steps of accumulation are named."""


def remedies(cfg: DictConfig, error: OutOfMemory) -> str:
    """Keys that help, each with its peak of memory on one device as ``vlmlab plan`` counts it; as many as fit.

    Args:
        cfg: the configuration of the run.
        error: what did not fit.
    """
    stage = next(stage for stage in parse(cfg) if stage.name == error.stage)
    ranks = _ranks(cfg)
    try:
        now = _planned(cfg, error, ranks)
        found = [f"{keys}: {_gb(peak)}" for keys, peak in _fewer(cfg, stage, error, now, ranks)]
        whole = f" of {_gb(torch.cuda.get_device_properties().total_memory)}" if on_gpu(cfg) else ""
        before = f"by the plan it needs about {_gb(now.peak)}{whole}, and less with "
    except Exception as mistake:  # the step's own error must be told, whatever keeps the plan from counting
        found = [key for key, _ in _changes(cfg, stage, ranks)]
        before = f"the plan cannot count this composition ({type(mistake).__name__}); less is needed with "
    room = LONGEST - len(f"{error}; {before}")
    return (
        before + listed(found, room, "; ")
        if found
        else "no key needs less here: take a smaller tower or a larger device"
    )


def _fewer(cfg: DictConfig, stage: Stage, error: OutOfMemory, now: StagePlan, ranks: int) -> Iterator[tuple[str, int]]:
    """Settings and their peaks in bytes, of those that need less than now."""
    parts = [k for k in range(stage.accumulate + 1, stage.batch_size + 1) if stage.batch_size % (k * ranks) == 0]
    compares = any(objective.per_micro_batch for objective in build_objectives(stage).values())
    for count in () if compares else parts[:SHOWN]:
        micro = stage.batch_size // (count * ranks)
        if (peak := now.peak_of(micro)) < now.peak:
            yield f"{stage.key('accumulate')}={count}", peak
    for setting, changed in _changes(cfg, stage, ranks):
        if (peak := _planned(changed, error, ranks).peak) < now.peak:
            yield setting, peak


def _changes(cfg: DictConfig, stage: Stage, ranks: int) -> Iterator[tuple[str, DictConfig]]:
    """Other settings of the same recipe that may need less, and the configuration with each."""
    found: list[tuple[str, Any]] = [(key, True) for key in CHECKPOINTING if OmegaConf.select(cfg, key) is False]
    if ranks > 1 and cfg.trainer.strategy != FSDP2:
        found.append(("trainer.strategy", FSDP2))
    if not choose(str(cfg.precision.name), on_gpu(cfg)).half and on_gpu(cfg):
        found.append(("precision", "bf16"))
    for key, value in found:
        changed = cfg.copy()
        OmegaConf.update(changed, "precision.name" if key == "precision" else key, value)
        yield f"{key}={str(value).lower()}", changed


def _planned(cfg: DictConfig, error: OutOfMemory, ranks: int) -> StagePlan:
    """The plan of the stage as it runs here, for rows as long as the one that did not fit."""
    precise = cfg.copy()
    OmegaConf.update(precise, "precision.name", choose(str(cfg.precision.name), on_gpu(cfg)).shown)
    lengths = None
    if error.samples and OmegaConf.select(cfg, "collate.pack_length") is None:
        lengths = {error.stage: [error.asked, error.answered]}
    settings = Settings(DEVICES["h100"], ranks, cfg.trainer.strategy == FSDP2, lengths=lengths)
    return plan(precise, settings, only=[error.stage])[0]


def _ranks(cfg: DictConfig) -> int:
    devices = cfg.trainer.devices
    if isinstance(devices, int) and devices > 0:
        return devices * int(OmegaConf.select(cfg, "trainer.nodes") or 1)
    return max(1, torch.cuda.device_count()) if on_gpu(cfg) else 1


def _gb(number: float) -> str:
    return f"{number / 1e9:.3g} GB"

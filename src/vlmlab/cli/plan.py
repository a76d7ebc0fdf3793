"""The plan command: ``vlmlab plan preset=... device=...`` says what a recipe needs. Nothing is loaded or trained."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vlmlab.analyse.text import plain_table
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules import admitted
from vlmlab.cli.rules.schema import Plan
from vlmlab.cli.seeds import CLAIM, run_seeds
from vlmlab.cli.verb import own_keys, run_verb
from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.terminal import tell
from vlmlab.data.overlap import reads
from vlmlab.plan.devices import DEVICES, Device, this_cpu
from vlmlab.recipe.preset import deviations
from vlmlab.recipe.stage import parse
from vlmlab.runs.files import check_place, write_json

if TYPE_CHECKING:
    from vlmlab.plan.plan import Settings, StagePlan


def plan_command(cfg: DictConfig) -> None:
    """Print the plan, and write it where ``out`` says.

    Raises:
        ConfigError: the composition breaks a rule, or a key has a value it cannot have.
        UserError: the data cannot be read, or the composition cannot be planned.
    """
    admitted(cfg, HydraConfig.get(), Plan)
    for key in CLAIM:
        if cfg[key] != own_keys("plan")[key]:
            raise ConfigError(f"{key}={cfg[key]} is about the seeds of a sweep; write vlmlab plan -m and sweep a key")
    device = _device(cfg)
    if cfg.out is not None:
        check_place(Path(str(cfg.out)), "out")
    stages = [stage.name for stage in parse(cfg)]
    lengths = {name: _pair(name, value) for name, value in _per_stage(cfg, "lengths", stages).items()}
    samples = _per_stage(cfg, "samples", stages)
    from vlmlab.plan.plan import Settings, as_json, plan  # from here on torch

    settings = Settings(
        device=device,
        devices=(cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1) * (cfg.trainer.get("nodes") or 1),
        sharded=cfg.trainer.strategy == "fsdp2",
        mfu=float(cfg.mfu),
        headroom=float(cfg.headroom),
        sample=int(cfg.sample),
        lengths=lengths,
        samples=samples,
    )
    found = plan(cfg, settings, told=lambda text: tell(text, sys.stderr))
    if not found:
        raise UserError("recipe.stages trains nothing: no part named in train has weights in this composition.")
    told = [f"note: {text}" for text in deviations(cfg)]
    tell("\n".join([*lines(found, settings), *told, *generated(cfg, lengths)]))
    if cfg.out is not None:
        write_json(Path(str(cfg.out)), as_json(found, settings))
        tell(f"\n{cfg.out}")


def _per_stage(cfg: DictConfig, key: str, stages: Sequence[str]) -> dict[str, Any]:
    value: Any = OmegaConf.to_container(cfg[key], resolve=True)
    for name in value:
        if name not in stages:
            raise ConfigError(f"{key}.{name} is not a stage of this recipe; choose from {listed(stages)}")
    return {str(name): item for name, item in value.items()}


def _pair(name: str, value: list[int]) -> list[int]:
    if len(value) != 2 or value[1] < 1:
        raise ConfigError(
            f"lengths.{name}={value} is not a pair; give tokens before the answer and of it, as in [20,60]"
        )
    return value


def _device(cfg: DictConfig) -> Device:
    if cfg.device not in DEVICES:
        known = ", ".join(DEVICES)
        raise ConfigError(f"device={cfg.device} is unknown; choose one of {known}, with memory= and tflops= any other")
    device = this_cpu(int(cfg.trainer.threads)) if cfg.device == "cpu" else DEVICES[cfg.device]
    if cfg.memory is not None:
        device = replace(device, name=f"{device.name} with {cfg.memory:g} GB", memory=float(cfg.memory) * 1e9)
    if cfg.tflops is not None:
        device = replace(device, name=f"{device.name} at {cfg.tflops:g} TFLOP/s", flops=float(cfg.tflops) * 1e12)
    return device


# -- the tables ------------------------------------------------------------------------------------------------------


def lines(found: Sequence[StagePlan], settings: Settings) -> list[str]:
    """The plan in words and tables."""
    device, hours = settings.device, sum(stage.hours for stage in found)
    total = sum(size for size, _ in found[-1].parameters.values())
    return [
        f"{settings.devices} x {device.name} ({device.memory / 1e9:.1f} GB, {_speed(device)})"
        f" at {settings.mfu:.0%} utilisation: {hours:.3g} h, {hours * settings.devices:.3g} device hours",
        "",
        f"parameters, {total:,} in all",
        *_parameters(found),
        "",
        "work, of one sample of mean length",
        *_work(found),
        "",
        "memory of one device in GB, with a micro-batch of the longest samples",
        *_memory(found),
        "",
        *[f"note: {note}" for note in _notes(found, settings)],
    ]


def _speed(device: Device) -> str:
    if device.half:
        return f"{device.flops / 1e12:g} TFLOP/s in 16 bit"
    return f"{device.flops_fp32 / 1e12:.3g} TFLOP/s in 32 bit"


def _parameters(found: Sequence[StagePlan]) -> list[str]:
    parts = list(dict.fromkeys(part for stage in found for part in stage.parameters))
    rows = []
    for part in parts:
        sizes = [stage.parameters.get(part, (0, 0)) for stage in found]
        trained = [f"{live:,}" if live else "frozen" for _, live in sizes]
        rows.append([part, f"{max(size for size, _ in sizes):,}", *trained])
    return plain_table(["part", "all", *(f"trained in\n{stage.name}" for stage in found)], rows)


def _work(found: Sequence[StagePlan]) -> list[str]:
    head = ["stage", "samples", "steps", "visual\ntokens", "tokens,\nmean", "tokens,\nlongest", "super-\nvised",
            "forward\nGFLOP", "training\nGFLOP", "hours"]  # fmt: skip
    rows = [
        [s.name, f"{s.samples:,}", f"{s.steps:,}", str(s.visual_tokens), f"{s.length:.0f}", f"{s.longest}",
         f"{s.supervised:.0f}", f"{s.forward / 1e9:,.4g}", f"{s.training / 1e9:,.4g}", f"{s.hours:.3g}"]
        for s in found
    ]  # fmt: skip
    return plain_table(head, rows)


def _memory(found: Sequence[StagePlan]) -> list[str]:
    head = ["stage", "weights", "gradients", "optimizer", "DDP", "micro-\nbatch", "activations", "peak",
            "largest\nmicro-batch", "model file", "last.ckpt"]  # fmt: skip
    rows = [
        [s.name, *(_gb(n) for n in (s.weights, s.gradients, s.optimizer, s.buckets)), str(s.micro_batch),
         _gb(s.activations), _gb(s.peak), str(s.fits), _gb(s.file), _gb(s.checkpoint)]
        for s in found
    ]  # fmt: skip
    return plain_table(head, rows)


def _gb(number: float) -> str:
    return f"{number / 1e9:.3g}" if number >= 1e7 else f"{number / 1e9:.2g}"


def _notes(found: Sequence[StagePlan], settings: Settings) -> list[str]:
    notes = [f"{s.name}: lengths {s.measured}" for s in found]
    notes += [f"{s.name}: one question a row, since {s.apart}" for s in found if s.apart]
    if not all(s.own_tokenizer for s in found):
        notes.append(
            "the LM's tokenizer is not here: measured lengths are in tokens of the embedded LM, which needs more"
        )
    for s in found:
        if s.fits >= s.micro_batch:
            continue
        key = f"recipe.stages.{s.name}.accumulate"
        remedy = f"{key}={s.accumulate} fits" if s.accumulate else "not even one sample does"
        each = f"each sample takes {_gb(s.activations_sample)} GB beside {_gb(s.activations_base)} GB for any"
        notes.append(
            f"{s.name}: a micro-batch of {s.micro_batch} does not fit ({each}); {remedy}; "
            "lm.gradient_checkpointing=true keeps less"
        )
    for s in found:
        if s.accumulate and _at_once(s, settings) > s.micro_batch:
            key = f"recipe.stages.{s.name}.accumulate={s.accumulate}"
            notes.append(f"{key} fits too: micro-batches of {_at_once(s, settings)} instead of {s.micro_batch}")
    return notes


def _at_once(stage: StagePlan, settings: Settings) -> int:
    """Samples of a micro-batch of the fewest that a step needs."""
    return stage.samples // (stage.steps * stage.accumulate * settings.devices)


def generated(cfg: DictConfig, stated: Collection[str]) -> list[str]:
    """A warning where an LM of somebody else's is planned with the lengths of the embedded world."""
    if cfg.lm.get("path") is None:
        return []
    stages = [s.name for s in parse(cfg) if s.name not in stated and s.steps and not reads(cfg.data.train[s.data])]
    if not stages:
        return []
    return [
        "note: the lengths are those of generated scenes, which are short, and so are the hours: give data=... with",
        f"      its paths, or state lengths, as in 'lengths={{{stages[-1]}: [100, 200]}}'",
    ]


if __name__ == "__main__":
    gc.disable()  # one plan is soon made, and nothing of it is waited for to be collected
    many = any(word in ("-m", "--multirun") for word in sys.argv[1:])
    sys.exit(run_seeds(sys.argv[1:]) if many else run_verb("plan", plan_command))

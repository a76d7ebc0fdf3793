"""The validation of a stage, built from the keys of ``evaluation``; and the best weights beside the last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import CheckpointError
from vlmlab.contracts.sample import SampleSource
from vlmlab.engine.restore import evaluated_file
from vlmlab.engine.stage import StageModule
from vlmlab.engine.stamp import Stamp
from vlmlab.engine.weights import StagedModel
from vlmlab.evaluate.baselines import Limited
from vlmlab.evaluate.run import held_out, mean_loss
from vlmlab.evaluate.slices import Slice
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import Stage
from vlmlab.runs.files import read_json, write_json
from vlmlab.runs.folder import BEST, BEST_FACTS, RunFolder
from vlmlab.train.choice import Choice, kept_since, looks_of
from vlmlab.train.validation import KeepBest, Say, Validation, Write

OWN = ("held_out/loss", "held_out/shuffled_loss", "held_out/gap")
"""Numbers that only a stage has whose own data have held-out samples."""


def validation_of(
    cfg: DictConfig,
    folder: RunFolder,
    module: StageModule,
    staged: StagedModel,
    stamp: Stamp | None,
    collate: Callable[..., Any],
    home: Path,
    write: Write,
    say: Say,
) -> Validation | None:
    """With ``evaluation.every``, the validation of a stage; None where there is nothing to validate on.

    Args:
        cfg: the configuration: ``evaluation``, ``data.val``, ``data.benchmarks``.
        folder: of the run.
        module: of the stage; says how far it is.
        staged: the model.
        stamp: of the run and the stage, for the weights that are kept.
        collate: of the stage's own prompt.
        home: the stage's folder.
        write: takes a row for ``metrics.jsonl``.
        say: takes a line.

    Raises:
        UserError: a benchmark's slice is too small for its metric.
    """
    stage, keys = module.stage, cfg.get("evaluation") or OmegaConf.create({})
    if not keys.get("every"):
        return None
    sources = _held_out(cfg, stage, collate)
    slices = [Slice(cfg, str(name)) for name in keys.get("slices") or ()]
    if not (sources or slices) or not isinstance(module.model, VLM):
        say(f"note: stage {stage.name} is not validated: it has no held-out samples, or its model does not generate")
        return None
    keep = _keep(cfg, folder, module, "" in sources, partial(_save, stage, staged, stamp, home, cfg), home, say)
    decides = keep is not None and not keep.choice.monitor.startswith("held_out/")
    return Validation(
        sources,
        partial(mean_loss, collate, size=int(keys.batch_size)),
        int(keys.every),
        write,
        slices,
        None if decides else keys.get("max_share"),
        keep,
        say,
        compiled=bool(cfg.trainer.get("compile")),
    )


def _held_out(cfg: DictConfig, stage: Stage, collate: Callable[..., Any]) -> dict[str, SampleSource]:
    """Held-out samples by the name they have in a row: the stage's own, and those watched."""
    own = stage.data
    names = {"": own} if own in cfg.data.get("val", {}) else {}
    names |= {str(name): str(name) for name in OmegaConf.select(cfg, "evaluation.watched") or ()}
    most = int(cfg.evaluation.held_out_samples)
    read = {name: held_out(cfg, name, lambda sample: collate([sample])) for name in names.values()}
    return {shown: Limited(read[name], most) for shown, name in names.items()}


def _keep(
    cfg: DictConfig,
    folder: RunFolder,
    module: StageModule,
    own: bool,
    save: Callable[[Choice, int, int, float], None],
    home: Path,
    say: Say,
) -> KeepBest | None:
    """What knows the best look; None where nothing is chosen, or the stage has no such number."""
    choice, stage = Choice.of(cfg), module.stage
    if choice is None:
        return None
    if choice.monitor in OWN and not own:
        say(f"note: data.val has no {stage.data}, so that stage {stage.name} is neither ended early nor its best kept")
        return None
    looks = looks_of(folder.metrics(), choice, stage.name, module.done) if module.done else []
    since = kept_since(home, choice) if looks else 0
    if since is None:  # its best look so far was not kept
        since = module.done + 1
        if choice.save:
            say(f"note: of stage {stage.name} only validations after step {module.done} can be kept as the best")
    return KeepBest(choice, looks, partial(save, choice, since), since)


def _save(stage: Stage, staged: StagedModel, stamp: Stamp | None, home: Path, cfg: DictConfig, *found: Any) -> None:
    """Keep the weights as they are beside the last ones: the file first, then its facts."""
    choice, since, step, value = found
    staged.save(home / BEST, stage, cfg, stamp)
    facts = {"monitor": choice.monitor, "mode": choice.mode, "since": since, "step": step, "value": value}
    write_json(home / BEST_FACTS, facts, durable=True)


def check_best(home: Path, keep: KeepBest | None, say: Say) -> None:
    """After a stage: what is kept is its best look; else it goes, as after a step was done again on another machine."""
    if keep is None or not keep.choice.save:
        return
    best, facts = keep.best(), read_json(home / BEST_FACTS) or {}
    if best is not None and facts.get("step") == best[0]:
        say(f"best {keep.choice.monitor} {best[1]:.4f}, after step {best[0]}: kept as {home / BEST}")
        return
    for name in (BEST_FACTS, BEST):
        (home / name).unlink(missing_ok=True)
    say(f"note: {home / BEST} was not of the best validation and is removed")


def load_best(cfg: DictConfig, folder: Path, stage: Stage, staged: StagedModel, stamp: Stamp | None) -> str | None:
    """With ``evaluation.load_best``, give the last stage's model its best weights; a sentence that says so.

    Raises:
        CheckpointError: none were kept.
    """
    if not OmegaConf.select(cfg, "evaluation.load_best"):
        return None
    file = evaluated_file(cfg, folder, stage)
    facts = read_json(file.with_name(BEST_FACTS)) or {}
    if facts.get("monitor") != cfg.evaluation.monitor or facts.get("mode") != cfg.evaluation.mode:
        raise CheckpointError(
            f"{file} is the best by {facts.get('monitor')} ({facts.get('mode')}) and evaluation.monitor is "
            f"{cfg.evaluation.monitor} ({cfg.evaluation.mode}); give that one, or evaluation.load_best=false."
        )
    staged.load(file, stamp)
    return (
        f"scores are of the weights after step {facts.get('step')} of stage {stage.name}, the best by "
        f"{facts.get('monitor')} (evaluation.load_best)"
    )

"""``last.ckpt``: all that the present stage needs to go on bit for bit, as tensors, lists and numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from vlmlab.contracts.errors import CheckpointError, reason
from vlmlab.engine.shards import gathered
from vlmlab.engine.stamp import RUN, Stamp, check_archive
from vlmlab.engine.weights import StagedModel, check_names, put
from vlmlab.recipe.stage import Stage
from vlmlab.runs.files import replacing

FORMAT = 1
"""Version of ``last.ckpt``."""


def save_last(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint at once and durably."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # let go of at once: a view that an exception keeps can crash the interpreter when both are collected
    with replacing(path, durable=True) as file, buffer.getbuffer() as view:
        file.write(view)


def content_of(
    stage: Stage,
    step: int,
    staged: StagedModel,
    optimizer: Optimizer,
    scaler: dict[str, Any],
    rng: list[dict[str, Any]],
    before: dict[str, str],
    pending: set[str],
    seconds: float,
    keep: bool = True,
    stamp: Stamp | None = None,
) -> dict[str, Any]:
    """What ``last.ckpt`` holds. The schedule and the order of the data are functions of `step`: no state.

    Shards become whole tensors, for which every rank calls this; only one, with `keep`, has them afterwards.
    """
    return {
        "format": FORMAT,
        "stage": stage.name,
        "step": step,
        "weights": gathered({name: tensor.detach() for name, tensor in staged.live().items()}, keep),
        "names": list(staged.trained()),
        "optimizer": gathered(optimizer.state_dict(), keep),
        "scaler": scaler,
        "rng": rng,
        "before": before,
        "pending": sorted(pending),
        "seconds": seconds,
    } | ({} if stamp is None else {RUN: asdict(stamp)})


def load_last(path: Path, stage: Stage, staged: StagedModel, stamp: Stamp | None = None) -> dict[str, Any] | None:
    """Read a checkpoint, put its weights into the model and return it; None where there is none.

    Args:
        path: of the file.
        stage: the stage it is of.
        staged: the model.
        stamp: of the run and stage that it must belong to; None: any.

    Raises:
        CheckpointError: it cannot be read, is damaged, belongs to another run, stage or composition, or is of a step
            that the stage does not have.
    """
    if not path.is_file():
        return None
    check_archive(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader says of bytes that mean nothing
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}); delete it to train that stage again."
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or saved.get("stage") != stage.name:
        raise CheckpointError(f"{path} is not a checkpoint of stage {stage.name}; delete it to train that stage again.")
    if stamp is not None:
        stamp.check(path, saved)
    step = saved.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= stage.steps:
        raise CheckpointError(
            f"{path} is of step {step} and stage {stage.name} has {stage.steps}; delete it to train that stage again."
        )
    if (wrong := _wrong_key(saved, staged)) is not None:
        raise CheckpointError(f"{path} is damaged (its {wrong} is none); delete it to train that stage again.")
    live = staged.live()
    check_names(path, live, saved["weights"])
    for name, tensor in saved["weights"].items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path} is damaged ({name} is not a tensor); delete it to train that stage again.")
        if tensor.shape != live[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)} and the model's is {tuple(live[name].shape)}; "
                "delete it to train that stage again."
            )
    put(staged.model, saved["weights"])
    return saved


KINDS: Mapping[str, type | tuple[type, ...]] = {
    "weights": dict,
    "names": list,
    "optimizer": dict,
    "scaler": dict,
    "rng": list,
    "before": dict,
    "pending": list,
    "seconds": (int, float),
}
"""Keys of ``last.ckpt`` beside those that say what it is of, and what they hold."""


def _wrong_key(saved: Mapping[str, Any], staged: StagedModel) -> str | None:
    """The first key that is missing or holds something else."""
    for key, kind in KINDS.items():
        if not isinstance(saved.get(key), kind):
            return key
    live = staged.live()
    if saved["before"].keys() != {*live, *staged.frozen()}:
        return "before"
    return None if all(isinstance(name, str) and name in live for name in saved["pending"]) else "pending"

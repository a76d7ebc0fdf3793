"""Beginning with the weights of an earlier run: which of its file's tensors go where, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vlmlab.contracts.errors import CheckpointError
from vlmlab.engine.stamp import check_whole
from vlmlab.engine.weights import BASE, Trainee, check_sources, plain_key, read_facts, read_tensors, tensor_names
from vlmlab.runs.config import leaves
from vlmlab.runs.origin import KEY
from vlmlab.runs.renamed import with_present_names

OBJECTIVES = "objectives."
"""Before the names of weights that belong to objectives of one stage; the next stage has its own."""


def fits_as_built(trainee: Trainee, path: Path) -> bool:
    """Whether all tensors of a stage's file are in the model before any adapter of its first stage wraps it."""
    named = trainee.named()
    return all(name in named or name.startswith(OBJECTIVES) for name in tensor_names(path))


def holds(path: Path, part: str) -> bool:
    """Whether a stage's file has weights of a part of the model."""
    return any(name.startswith(f"{part}.") for name in tensor_names(path))


def begin_with(trainee: Trainee, path: Path, cfg: DictConfig) -> list[str]:
    """Have the weights of an earlier run's stage; what that file does not hold stays as it was made.

    Args:
        trainee: the model that begins.
        path: ``model.safetensors`` of the stage.
        cfg: the configuration, whose parts are compared with those the weights were trained in.

    Returns:
        Settings that differ from those the weights were trained with, in words.

    Raises:
        CheckpointError: other towers, or a part that does not fit: missing, of another class or of other shapes; or
            the file is damaged.
    """
    facts, named, found = read_facts(path), trainee.named(), read_tensors(path)
    tensors = {n: t for n, t in found.items() if n in named or not n.startswith(OBJECTIVES)}
    saved, now = dict(facts.get("sources", {})), trainee.sources()
    common = saved.keys() & now.keys()
    shown = f"{KEY}={OmegaConf.select(cfg, KEY)}"
    check_sources(shown, {p: saved[p] for p in common}, {p: now[p] for p in common}, f"choose that tower, or no {KEY}")
    before = with_present_names(facts.get("composition", {}))
    own = {name.partition(".")[0] for name in tensors} - now.keys()  # a tower is known by its hash
    notes = [note for part in before for note in _compared(part, before[part], cfg, shown, part in own)]
    for name, tensor in tensors.items():
        if name not in named:
            raise _misfit(name, f"has {name}, which this one has not", shown)
        if named[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, here it is {tuple(named[name].shape)}"
            raise _misfit(name, f"has {name} of shape {shapes}", shown)
    _check_parts(trainee, tensors, shown)
    check_whole(path, facts, found)
    kinds = {name: torch.promote_types(tensor.dtype, named[name].dtype) for name, tensor in tensors.items()}
    trainee.take({name: tensor.to(kinds[name]) for name, tensor in tensors.items()})  # what trains stays float32
    trainee.begun_with(tensors)
    return notes


def _compared(part: str, before: Any, cfg: DictConfig, shown: str, own: bool) -> Iterator[str]:
    """Settings of a part that differ; another class is refused where it is the class's `own` weights that come."""
    old = dict(leaves(before, deep=True)) if isinstance(before, Mapping) else {}
    plain = json.loads(json.dumps(plain_key(cfg, part), default=str))
    new = dict(leaves(plain, deep=True)) if isinstance(plain, Mapping) else {}
    for key in sorted({*old, *new}):
        was, is_ = old.get(key), new.get(key)
        if was == is_:
            continue
        if own and key.rpartition(".")[2] == "_target_":
            kinds = f"is a {_word(was)}, here it is a {_word(is_)}"
            raise _misfit(part, kinds, shown)
        yield f"{part}.{key}={is_} here, {was} where the weights were trained"


def _word(target: Any) -> str:
    return str(target).rpartition(".")[2]


def _check_parts(trainee: Trainee, tensors: Mapping[str, Tensor], shown: str) -> None:
    """A part that no tower is the source of comes whole or not at all: half of a deeper connector is no connector."""
    parts: Mapping[str, Any] = trainee.model.parts()  # type: ignore[operator]
    for part, owned in parts.items():
        if part.removesuffix(BASE) in trainee.sources():
            continue
        missing = [name for name, _ in owned if name not in tensors]
        if missing and len(missing) < len(owned):
            raise _misfit(missing[0], f"lacks {missing[0]}", shown)


def _misfit(name: str, problem: str, shown: str) -> CheckpointError:
    part = name.partition(".")[0]
    return CheckpointError(
        f"{shown}: the {part} does not fit: there it {problem}; choose the {part} it was trained with, another stage, "
        f"or no {KEY}."
    )

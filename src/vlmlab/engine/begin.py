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
from vlmlab.engine.weights import BASE, StagedModel, check_sources, plain_key, read_facts, read_tensors, tensor_names
from vlmlab.recipe.stage import Stage
from vlmlab.runs.config import leaves
from vlmlab.runs.origin import KEY
from vlmlab.runs.renamed import with_present_names

OBJECTIVES = "objectives."
"""Before the names of weights that belong to objectives of one stage; the next stage has its own."""


def fits_as_built(staged: StagedModel, path: Path) -> bool:
    """Whether all tensors of a stage's file are in the model before any adapter of its first stage wraps it."""
    named = staged.named()
    return all(name in named or name.startswith(OBJECTIVES) for name in tensor_names(path))


def holds(path: Path, part: str) -> bool:
    """Whether a stage's file has weights of a part of the model."""
    return any(name.startswith(f"{part}.") for name in tensor_names(path))


def begin_with(staged: StagedModel, path: Path, cfg: DictConfig) -> list[str]:
    """Have the weights of an earlier run's stage; what that file does not hold stays as it was made.

    Args:
        staged: the model that begins.
        path: ``model.safetensors`` of the stage.
        cfg: the configuration, whose parts are compared with those the weights were trained in.

    Returns:
        Settings that differ from those the weights were trained with, in words.

    Raises:
        CheckpointError: other towers, or a part that does not fit: missing, of another class or of other shapes; or
            the file is damaged.
    """
    facts, named, found = read_facts(path), staged.named(), read_tensors(path)
    tensors = {n: t for n, t in found.items() if n in named or not n.startswith(OBJECTIVES)}
    saved, now = dict(facts.get("sources", {})), staged.sources()
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
    _check_parts(staged, tensors, shown)
    check_whole(path, facts, found)
    kinds = {name: torch.promote_types(tensor.dtype, named[name].dtype) for name, tensor in tensors.items()}
    staged.take({name: tensor.to(kinds[name]) for name, tensor in tensors.items()})  # what trains stays float32
    staged.begun_with(tensors)
    return notes


def take_encoder(staged: StagedModel, path: Path, stage: Stage) -> list[str]:
    """Have the encoder of an earlier stage's two towers; what this model cut off its own (a pooling head) is left out.

    Args:
        staged: the model of the stage that begins, before any adapter of it wraps the encoder.
        path: ``model.safetensors`` of the earlier stage.
        stage: the one that begins.

    Returns:
        The names of the weights that came from there; none where that stage left the encoder as it was loaded.

    Raises:
        CheckpointError: the encoder there is another one, or has an adapter; or the file is damaged.
    """
    facts, named, found = read_facts(path), staged.named(), read_tensors(path)
    check_whole(path, facts, found)
    saved, now = dict(facts.get("sources", {})), staged.sources()
    key = stage.key("encoder_from")
    here, there = ({"encoder": s["encoder"]} if "encoder" in s else {} for s in (now, saved))
    check_sources(f"{key}={stage.encoder_from}", there, here, "both stages take the encoder of the configuration")
    tensors = {name: tensor for name, tensor in found.items() if name.startswith("encoder.")}
    wanted = [name for name, _ in dict(staged.model.parts()).get("encoder", [])]  # type: ignore[operator]
    if not tensors:
        return []
    for name in wanted:
        if name not in tensors and "encoder" in now:
            continue  # a layer that did not train there is the tower's own
        if name not in tensors or tensors[name].shape != named[name].shape:
            raise CheckpointError(
                f"{key}={stage.encoder_from}: its encoder has no {name} of shape {tuple(named[name].shape)}; train "
                "the encoder itself there, without an adapter."
            )
    tensors = {name: tensor for name, tensor in tensors.items() if name in named}
    if not tensors:
        raise CheckpointError(
            f"{key}={stage.encoder_from}: only an adapter of the encoder trained there; train it whole."
        )
    staged.take(
        {name: tensor.to(torch.promote_types(tensor.dtype, named[name].dtype)) for name, tensor in tensors.items()}
    )
    staged.begun_with(tensors)
    return sorted(tensors)


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


def _check_parts(staged: StagedModel, tensors: Mapping[str, Tensor], shown: str) -> None:
    """A part without a source tower is loaded whole or not at all: half of a deeper connector is not a connector."""
    parts: Mapping[str, Any] = staged.model.parts()  # type: ignore[operator]
    for part, owned in parts.items():
        if part.removesuffix(BASE) in staged.sources():
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

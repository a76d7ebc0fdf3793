"""The transformer layers of a tower, found by its structure: which of them train, and how fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmlab.contracts.errors import UserError
from vlmlab.lm.inside import PortedLayer
from vlmlab.recipe.stage import LAYERED, Stage

GRAPHS = 64
"""Of one kind of layer; torch's own limit is 8."""

Places = dict[int, tuple[int, int]]
"""Identity of a parameter -> the layer it is in (-1: before the first) and the number of layers."""


def stacks(part: nn.Module) -> Iterator[tuple[PreTrainedModel, nn.ModuleList]]:
    """Every transformers tower inside a part, with its layers.

    They are the longest outermost ``nn.ModuleList`` with no more entries than the tower's ``num_hidden_layers``: as
    many, or fewer where the encoder has cut off those after its tapped feature.
    """
    for tower in _outermost(part, PreTrainedModel):
        depth = getattr(tower.config, "num_hidden_layers", 0)
        found = [s for s in _outermost(tower, nn.ModuleList) if 0 < len(s) <= depth]
        if found:
            yield tower, max(found, key=len)


def tower_layers(model: Any) -> Iterator[nn.Module]:
    """The transformer layers of all towers of a model."""
    towers = (getattr(model, part, None) for part in LAYERED)
    return (layer for tower in towers if tower is not None for _, stack in stacks(tower) for layer in stack)


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """While this is open the layers of all towers compute by ``torch.compile``, one graph for all of a kind and length.

    Only their ``forward`` is replaced, so that names of weights and what hangs on calls (shards, recomputation) stay.
    Blocks inside the layers bring a few graphs for every number of images a row; beyond torch's limit layers would
    quietly run uncompiled.
    """
    layers: list[Any] = list(tower_layers(model))
    places = ["compute" if isinstance(layer, PortedLayer) else "forward" for layer in layers]
    for layer, place in zip(layers, places, strict=True):
        setattr(layer, place, torch.compile(getattr(layer, place), dynamic=True))
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            yield
    finally:
        for layer, place in zip(layers, places, strict=True):
            delattr(layer, place)


def places(part: nn.Module) -> Places:
    """Which layer every parameter of a part is in, an adapter's in the layers too.

    What a tower registers before its layers (embeddings) is at -1, what comes after them (last norm, head) is taken
    for the last layer; parameters outside a tower with layers are absent.
    """
    found: Places = {}
    for tower, stack in stacks(part):
        inside = {id(p): i for i, layer in enumerate(stack) for p in layer.parameters()}
        at = -1
        for parameter in tower.parameters():
            at = len(stack) - 1 if id(parameter) in inside else at
            found[id(parameter)] = inside.get(id(parameter), at), len(stack)
    return found


def chosen(model: Any, stage: Stage, part: str) -> set[int] | None:
    """Identities of the parameters in the layers that a stage trains of a part; None: it trains the whole part.

    Raises:
        UserError: the part has no such layer.
    """
    module = getattr(model, part, None)
    if part not in (stage.layers or {}) or module is None:
        return None
    first, last = (stage.layers or {})[part]
    key = f"{stage.key('layers')}.{part}=[{first},{last}]"
    depths = {len(stack) for _, stack in stacks(module)}
    if not depths:
        raise UserError(f"{key}: this {part} has no transformer layers; leave the key out.")
    depth = min(depths)
    if not all(-depth <= end < depth for end in (first, last)) or first % depth > last % depth:
        raise UserError(f"{key}: this {part} has {depth} layers; give [first, last] from {-depth} to {depth - 1}.")
    found: set[int] = set()
    for _, stack in stacks(module):
        begin, end = first % len(stack), last % len(stack)
        found |= {id(p) for layer in stack[begin : end + 1] for p in layer.parameters()}
    return found


def check_layers(model: Any, stage: Stage) -> None:
    """Refuse ranges that the model does not have.

    Raises:
        UserError: naming the stage's key.
    """
    for part in stage.layers or {}:
        chosen(model, stage, part)


def decayed(model: Any, stage: Stage) -> dict[int, float]:
    """Share of its part's learning rate by a parameter's identity, ``layer_decay`` ** (layers above its own).

    The last layer and what comes after it have the full rate, what is before the first layer has the share
    ``layer_decay`` ** (number of layers).
    """
    if stage.layer_decay == 1.0:
        return {}
    modules = [getattr(model, part, None) for part in LAYERED if stage.trains(part)]
    found = [place for module in modules if module is not None for place in places(module).items()]
    return {parameter: stage.layer_decay ** (depth - 1 - layer) for parameter, (layer, depth) in found}


def _outermost(module: nn.Module, kind: type[Any]) -> Iterator[Any]:
    """The modules of a kind that are inside no other of that kind, in order."""
    if isinstance(module, kind):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kind)

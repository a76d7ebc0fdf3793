"""What an answer costs: the images are looked at, the prompt is read, and one more token is computed with the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmlab.contracts.tensors import Batch
from vlmlab.engine.cost import answering, counted
from vlmlab.lm.inside import Inside
from vlmlab.model.vlm import VLM


@dataclass(frozen=True)
class Reading:
    """FLOPs (2 per multiply-add; an attention counts all its queries times all its keys) and bytes.

    Attributes:
        prompt: positions of the prompt in the LM's sequence.
        vision: FLOPs of the encoder, and of its text tower where the fusion reads one.
        fusing: FLOPs of the connector, and of what the fusion makes of the images before the LM's layers.
        prefill: FLOPs of the LM on the prompt with what acts inside its layers, and of the head at its last position.
        token: FLOPs of the next token, with the cache.
        cache: bytes of the LM's keys and values of the prompt.
        memory: bytes of what the fusion keeps of the images beside them.
    """

    prompt: int
    vision: int
    fusing: int
    prefill: int
    token: int
    cache: int
    memory: int

    @property
    def first(self) -> int:
        """FLOPs before the first token of the answer is there."""
        return self.vision + self.fusing + self.prefill

    @property
    def kept(self) -> int:
        """Bytes that are kept from the prompt while the answer is written."""
        return self.cache + self.memory

    def answering(self, tokens: int) -> int:
        """FLOPs of an answer of so many tokens; the growth of the cache by its own tokens is left out."""
        return self.first + (tokens - 1) * self.token


def answer_cost(model: VLM, batch: Batch) -> dict[str, int]:
    """Of one sample's prompt: added weights, FLOPs of a token after it, and bytes that are kept for that.

    Args:
        model: on the batch's device; its mode is restored.
        batch: a micro-batch of one sample.
    """
    with answering(model), counted() as counter:
        found = read(model, batch, counter.get_total_flops)
    return {"added": model.added(), "flops_token": found.token, "cache_bytes": found.kept}


@torch.no_grad()
def read(model: VLM, batch: Batch, flops: Callable[[], int]) -> Reading:
    """Read a prompt and go on by one token.

    Args:
        model: in the mode for answers (``eval``).
        batch: its prompts, of one length.
        flops: all that were counted so far.
    """
    marks = [flops()]
    if model.encoder is not None and len(batch.pixels):
        model.encoder(batch.pixels)
        model.text_states(batch)
    marks.append(flops())
    seen = model.see(batch)
    embeds, inside = model.embed(batch, seen), model.inside(batch, seen)
    marks.append(flops())
    cache = DynamicCache()
    states = model.lm.states(embeds, batch.layout, model.mask, inside, cache)  # (1, S, D)
    model.lm.logits(states[:, -1])
    marks.append(flops())
    layers: list[Any] = list(cache.layers)
    kept = _bytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
    _next(model, batch, embeds[:, -1:], inside, cache)
    marks.append(flops())
    vision, looked, prefill, token = (after - before for before, after in pairwise(marks))
    return Reading(
        prompt=embeds.shape[1],
        vision=vision,
        fusing=looked - vision,
        prefill=prefill,
        token=token,
        cache=kept,
        memory=0 if inside is None else _bytes(t for m in inside.memories.values() for t in m.tensors.values()),
    )


def _next(model: VLM, batch: Batch, embeds: Tensor, inside: Inside | None, cache: DynamicCache) -> None:
    """One token (1, 1, D) after the prompt."""
    length = batch.layout.kind.shape[1]
    place = torch.arange(length, length + 1, device=batch.layout.kind.device)
    within = None if inside is None else inside.at(place)
    states = model.lm.states(embeds, batch.layout.extended(length + 1), model.mask, within, cache)  # (1, 1, D)
    model.lm.logits(states[:, -1])


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of what shares its place once: blocks may read the same."""
    places = {(id(t.untyped_storage()), t.storage_offset(), t.shape): t for t in tensors}
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in places.values())

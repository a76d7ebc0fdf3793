"""``prefix``: keys and values made from the image are before those of the text in the LM's layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vlmlab.contracts.parts import Fusion, MemoryMask, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Layers, Width
from vlmlab.fusion.base import Positions, check_counts, check_words, chosen_layers, memory_tokens, sight, token_places
from vlmlab.lm.inside import Attend, before_the_keys, look, open_ports, seen_in_row

Gate = Literal["zero", "none"]


class ImagePrefix(Fusion):
    """Each layer's attention also reads keys and values that are made of every visual token, and nothing else changes.

    Prefix tuning (arXiv 2101.00190, section 4) with the prefix made from the image as Frozen makes its own for the
    embeddings (arXiv 2106.13884, section 3); for embeddings see ``connector=prefix``. Keys and values are linear in the
    connector's tokens, or in tanh(W x) of them with `hidden`, which one W serves for all layers (arXiv 2101.00190,
    section 4.3). They are not rotated: the image has no position in the text. With ``gate=none`` they share one softmax
    with the text's own keys, as in the papers, and the composition starts as nothing, since keys that say nothing take
    their share all the same. With ``gate=zero`` they have a softmax of their own, whose result is added times tanh(g),
    g a number a head that starts at zero (LLaMA-Adapter, arXiv 2303.16199, section 3.2), so that it starts as
    ``text_only``; then g alone has a gradient, from step 1 all weights have.

    Parameters per layer: 2 (c + 1) G dh, c being the tokens' width or `hidden` and G the heads of keys, and with
    ``gate=zero`` the number of heads; with `hidden` (Dt + 1) c once.

    Args:
        sees: which images a position sees.
        every: the last layer of every group of so many; 1: each.
        layers: indices of the layers instead; null takes `every`.
        gate: "zero" or "none".
        hidden: width of the hidden layer before all keys and values; null has none.
        positions: add the 2-D place of a visual token to it: "auto" where they form a grid, true, or false. Ours.

    Raises:
        UserError: an unknown gate, or a count below 1; from ``attach``: a layer that does not exist.
    """

    reads = "tokens"
    in_sequence = False

    def __init__(
        self,
        sees: MemoryMask,
        every: Width = 1,
        layers: Layers | None = None,
        gate: Gate = "zero",
        hidden: Width | None = None,
        positions: Positions = "auto",
    ) -> None:
        super().__init__()
        check_words(gate=(gate, Gate))
        check_counts(hidden=hidden)
        self.sees = sees
        self.every, self.layers = every, layers
        self.gate, self.hidden, self.positions = gate, hidden, positions
        self.starts_as = "text_only" if gate == "zero" else "nothing"
        self.places: Tensor | None

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the maps, and put each layer's around its attention."""
        ports = open_ports(model.lm.model)
        config, width = model.lm.model.config, model.token_width
        head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.model_tokens = model.connector.tokens_per_image(model.encoder.hw), width
        self.register_buffer("places", token_places(model, self.positions, width), persistent=False)
        self.enter = None if self.hidden is None else nn.Linear(width, self.hidden)
        sizes = self.hidden or width, head, int(config.num_attention_heads), int(config.num_key_value_heads)
        chosen = chosen_layers(len(ports), self.every, self.layers)
        self.blocks = nn.ModuleList(PrefixBlock(*sizes, self.gate == "zero") for _ in chosen)
        for k, (layer, block) in enumerate(zip(chosen, self.blocks, strict=True)):
            ports[layer].put("attention", block, f"{self.key}.{k}")

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """Keys and values of every layer, once per image."""
        tokens = memory_tokens(seen, *self.model_tokens, next(self.parameters()))  # (I, M, Dt)
        if self.places is not None:
            tokens = tokens + self.places.to(tokens.dtype)
        if self.enter is not None:
            tokens = self.enter(tokens).tanh()
        sees, slots = sight(self.sees, batch)
        made = ((k, block.memory(tokens)) for k, block in enumerate(self.blocks) if isinstance(block, PrefixBlock))
        return {f"{self.key}.{k}": Memory(tensors, sees, slots) for k, tensors in made}

    def waits(self, name: str) -> bool:
        """All but the gates, where there are any."""
        return self.gate == "zero" and not name.endswith(".gate")


class PrefixBlock(nn.Module):
    """A block around a layer's attention.

    Args:
        width: of what keys and values are made of.
        head: dh.
        heads: H.
        groups: G, heads of keys and values.
        gated: a softmax of their own, and a gate.
    """

    def __init__(self, width: int, head: int, heads: int, groups: int, gated: bool) -> None:
        super().__init__()
        self.groups = groups
        self.k, self.v = (nn.Linear(width, groups * head) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    def memory(self, tokens: Tensor) -> dict[str, Tensor]:
        """(I, M, c) -> keys and values (I, M, G, dh)."""
        return {n: part(tokens).unflatten(-1, (self.groups, -1)) for n, part in (("keys", self.k), ("values", self.v))}

    def forward(
        self,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        layout: Layout,
        keys: Layout,
        memory: Memory,
    ) -> Tensor:
        """(B, Q, H, dh)."""
        k, v = memory.tensors["keys"], memory.tensors["values"]  # (I, M, G, dh)
        if self.gate is not None:
            heads = [part.repeat_interleave(query.shape[1] // self.groups, 2).to(query.dtype) for part in (k, v)]
            told = look(query.transpose(1, 2), heads[0], heads[1], memory, scale).unflatten(-1, (query.shape[1], -1))
            return attend(query, key, value, mask) + self.gate.tanh()[:, None] * told
        if memory.slots.shape[1] == 0:
            return attend(query, key, value, mask) + 0.0 * (k.sum() + v.sum())
        sees, images = seen_in_row(memory)  # (B, Q, J), (B, J)
        told = [part[images].flatten(1, 2).transpose(1, 2) for part in (k, v)]  # (B, G, J * M, dh) each
        before = sees.repeat_interleave(k.shape[1], -1)[:, None]  # (B, 1, Q, J * M)
        if memory.watch is not None:
            memory.watch.ahead = before.shape[-1]
        return before_the_keys(attend, query, key, value, mask, told[0], told[1], before)

"""``gated_xattn``: gated cross-attention blocks before layers of the LM (Flamingo, arXiv 2204.14198; IDEFICS)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, MemoryMask, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Layers, Positive, Width
from vlmlab.fusion.base import Positions, check_counts, check_words, chosen_layers, memory_tokens, sight, token_places
from vlmlab.lm.inside import look, open_ports

Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Gate = Literal["scalar", "vector"]
At = Literal["last", "first"]


class GatedCrossAttention(Fusion):
    """y <- y + tanh(a) XAttn(norm(y), visual tokens); y <- y + tanh(b) FFW(norm(y)), before every k-th layer.

    a and b start at 0 (arXiv 2204.14198, section 2.2), so that the LM is at first what it was; at step 0 the gates
    alone have a gradient, from step 1 all weights have. Visual tokens are the connector's and are not normalised again.
    A position that sees no image gets nothing from the attention; the feed-forward layer acts on it all the same, as in
    the released code of OpenFlamingo and in IDEFICS, or does not, as in Mllama (`blind`). Keys and values of a block
    are computed once per image, not once per token.

    Args:
        sees: which images a position sees; Flamingo's is ``latest``.
        every: a block in every group of so many layers; 1: before each.
        at: before the "last" layer of each group (OpenFlamingo, Mllama) or the "first" (IDEFICS).
        layers: indices of the layers instead; null takes `every`.
        heads: of the attention.
        head_width: of a head; null shares the LM's width among the heads.
        kv_heads: heads of keys and values, each for as many heads of queries; null is `heads` (Mllama has fewer).
        hidden: width of the feed-forward layer as a multiple of the LM's.
        norm: "layer" (Flamingo) or "rms" (IDEFICS).
        mlp: "gelu" (Flamingo: two linear maps) or "swiglu" (IDEFICS: three).
        blind: whether the feed-forward layer acts on a position that sees no image.
        gate: "scalar", one a and b a block, or "vector", one a channel.
        qk_norm: RMS norm of queries and keys within each head (Mllama; an option of IDEFICS).
        positions: add the 2-D place of a visual token to it: "auto" where they form a grid, true, or false. This is
            ours: nothing else tells places apart that the encoder's features do not.

    Raises:
        UserError: an unknown norm, mlp, gate or place, a count below 1, or kv_heads that do not divide heads; from
            ``attach``: a layer that does not exist, or heads that do not divide the LM's width.
    """

    reads = "tokens"
    in_sequence = False
    starts_as = "text_only"

    def __init__(
        self,
        sees: MemoryMask,
        every: Width = 4,
        at: At = "last",
        layers: Layers | None = None,
        heads: Width = 8,
        head_width: Width | None = 64,
        kv_heads: Width | None = None,
        hidden: Positive = 4.0,
        norm: Norm = "layer",
        mlp: Mlp = "gelu",
        blind: bool = True,
        gate: Gate = "scalar",
        qk_norm: bool = False,
        positions: Positions = "auto",
    ) -> None:
        super().__init__()
        check_words(norm=(norm, Norm), mlp=(mlp, Mlp), gate=(gate, Gate), at=(at, At))
        check_counts(heads=heads, head_width=head_width, kv_heads=kv_heads)
        if kv_heads is not None and heads % kv_heads:
            raise UserError(f"fusion.kv_heads={kv_heads} does not divide fusion.heads={heads}; choose a divisor.")
        if hidden <= 0:
            raise UserError(f"fusion.hidden={hidden} is not possible; give the multiple of the LM's width, as 4.")
        self.sees = sees
        self.every, self.at, self.layers = every, at, layers
        self.shape = heads, head_width
        self.kinds = kv_heads or heads, hidden, norm, mlp, gate, qk_norm, blind
        self.positions = positions
        self.places: Tensor | None

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the blocks and put each before its layer."""
        ports = open_ports(model.lm.model)
        width, tokens = model.lm.width, model.token_width
        self.register_buffer("places", token_places(model, self.positions, tokens), persistent=False)
        heads, head_width = self.shape
        if head_width is None and width % heads:
            raise UserError(f"fusion.heads={heads} does not divide the LM's width {width}; set fusion.head_width.")
        each = head_width or width // heads
        chosen = chosen_layers(len(ports), self.every, self.layers, self.at)
        self.blocks = nn.ModuleList(CrossBlock(width, tokens, heads, each, *self.kinds) for _ in chosen)
        for k, (layer, block) in enumerate(zip(chosen, self.blocks, strict=True)):
            ports[layer].put("before", block, f"{self.key}.{k}")
        self.model_tokens = model.connector.tokens_per_image(model.encoder.hw), tokens

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """Keys and values of every block, once per image."""
        like = next(self.parameters())
        tokens = memory_tokens(seen, *self.model_tokens, like)  # (I, M, D)
        if self.places is not None:
            tokens = tokens + self.places.to(tokens.dtype)
        sees, slots = sight(self.sees, batch)
        made = ((k, block.memory(tokens)) for k, block in enumerate(self.blocks) if isinstance(block, CrossBlock))
        return {f"{self.key}.{k}": Memory(tensors, sees, slots) for k, tensors in made}

    def waits(self, name: str) -> bool:
        """All but the gates."""
        return not name.endswith("_gate")


class CrossBlock(nn.Module):
    """One gated block: attention to the images, then a feed-forward layer."""

    def __init__(
        self,
        width: int,
        tokens: int,
        heads: int,
        head_width: int,
        kv_heads: int,
        hidden: float,
        norm: str,
        mlp: str,
        gate: str,
        qk_norm: bool,
        blind: bool = True,
    ) -> None:
        super().__init__()
        self.blind = blind
        self.attention_norm = NORMS[norm](width)
        self.attention = CrossAttention(width, tokens, heads, head_width, kv_heads, qk_norm)
        self.attention_gate = nn.Parameter(torch.zeros(1 if gate == "scalar" else width))
        self.mlp_norm = NORMS[norm](width)
        self.mlp = FeedForward(width, int(hidden * width), mlp)
        self.mlp_gate = nn.Parameter(torch.zeros(1 if gate == "scalar" else width))

    def memory(self, tokens: Tensor) -> dict[str, Tensor]:
        """(I, M, Dt) -> keys and values (I, M, G, dh)."""
        keys, values = self.attention.memory(tokens)
        return {"keys": keys, "values": values}

    def forward(self, states: Tensor, *, layout: Layout, memory: Memory) -> Tensor:
        """(B, Q, D) states before the layer -> (B, Q, D)."""
        told = self.attention(self.attention_norm(states), memory.tensors["keys"], memory.tensors["values"], memory)
        states = states + self.attention_gate.tanh() * told
        inner = self.mlp(self.mlp_norm(states))  # (B, Q, D)
        if not self.blind:
            inner = inner.masked_fill(~memory.sees.any(-1, keepdim=True), 0.0)
        return states + self.mlp_gate.tanh() * inner


class CrossAttention(nn.Module):
    """Multi-head attention from text to visual tokens, without biases."""

    def __init__(self, width: int, tokens: int, heads: int, head_width: int, kv_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(tokens, kv_heads * head_width, bias=False)
        self.v = nn.Linear(tokens, kv_heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_width, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width, eps=1e-6) if qk_norm else nn.Identity()

    def memory(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(I, M, Dt) -> keys and values (I, M, G, dh)."""
        keys, values = (part(tokens).unflatten(-1, (self.kv_heads, -1)) for part in (self.k, self.v))
        return self.k_norm(keys), values

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, memory: Memory) -> Tensor:
        """(B, Q, D) -> (B, Q, D), zero where no image is seen."""
        q = self.q_norm(self.q(states).unflatten(-1, (self.heads, -1)))  # (B, Q, H, dh)
        if self.kv_heads < self.heads:
            keys, values = (x.repeat_interleave(self.heads // self.kv_heads, 2) for x in (keys, values))
        return self.out(look(q, keys, values, memory))


class FeedForward(nn.Module):
    """Two linear maps with GELU between, or SwiGLU's three; without biases."""

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False) if kind == "swiglu" else None
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(inner)


def _layer(width: int) -> nn.Module:
    return nn.LayerNorm(width)


def _rms(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6)


NORMS = {"layer": _layer, "rms": _rms}

"""``vlora``: weights of the LM made from the image, and no visual token anywhere (VLoRA, arXiv 2405.20339)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Fusion, MemoryMask, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Depth, Layers, Positive, Width
from vlmlab.fusion.base import check_counts, check_words, chosen_layers, memory_tokens, sight
from vlmlab.lm.inside import LayerPorts, open_ports, seen_in_row

Type = Literal["q", "k", "v", "o", "m"]
Images = Literal["mean", "sum"]
PORTS = {"q": "linear.q", "k": "linear.k", "v": "linear.v", "o": "linear.o", "m": "mlp"}


class PerceptualWeights(Fusion):
    """y = W x + (alpha / r) (x A) B^T at maps of some layers, A (Din, r) made of the image, B (Dout, r) a weight.

    One generator per type of map makes A for all its layers: as many learnt queries as layers go through `depth`
    decoder layers (self-attention, cross-attention to the image, a feed-forward layer of four times the width, each
    after a norm), and one linear map for all of them gives A. What the image is, is the connector's tokens, projected
    to the generators' width with a learnt vector for every place; the paper has no connector (``connector=none``). The
    type m is a branch beside the whole feed-forward network, not at its maps. B starts at zero, so that the LM is at
    first what it was, bit for bit; then B alone has a gradient, from step 1 all weights have.

    A position has the weights of the images that it sees. The paper has one image a sample; the mean or sum over
    several is ours. A is linear in its use, so that the mean is taken of what x A gives: no weight is ever put
    together, and a batch may hold any images. ``merged`` puts them together for one image.

    Parameters, g being `width`, M the visual tokens, K the layers: Dt g + g + M g, and per type
    K g + depth (16 g^2 + 11 g) + 2 g + (g + 1) Din r + K Dout r; without self-attention, which a single query has not,
    12 g^2 + 9 g.

    Args:
        sees: which images a position sees; the paper's whole sequence has them (``sample``).
        types: of q, k, v, o (the attention's maps) and m (the feed-forward network).
        every: the last layer of every group of so many; 1: each.
        layers: indices of the layers instead; null takes `every`.
        rank: r.
        alpha: null is r, so that the factor is 1.
        width: g; null is 512 for an LM of 2,048 or more channels, half its width below.
        depth: layers of a generator.
        heads: of its attention; null is g // 32, at least one.
        images: "mean" or "sum" over the images that a position sees.

    Raises:
        UserError: an unknown type, or a count below 1; from ``attach``: a layer that does not exist, a type that this
            family of LMs has not (its q, k and v are one map), or heads that do not divide the width.
    """

    reads = "tokens"
    in_sequence = False
    starts_as = "text_only"

    def __init__(
        self,
        sees: MemoryMask,
        types: Annotated[Sequence[Type], MinLen(1)] = ("q", "k", "v", "o", "m"),
        every: Width = 4,
        layers: Layers | None = None,
        rank: Width = 64,
        alpha: Positive | None = None,
        width: Width | None = None,
        depth: Depth = 8,
        heads: Width | None = None,
        images: Images = "mean",
    ) -> None:
        super().__init__()
        check_words(images=(images, Images))
        for kind in types:
            check_words(types=(kind, Type))
        check_counts(rank=rank, width=width, depth=depth, heads=heads)
        self.sees = sees
        self.types = list(dict.fromkeys(types))
        self.every, self.layers = every, layers
        self.rank, self.factor = rank, (rank if alpha is None else alpha) / rank
        self.width, self.depth, self.heads = width, depth, heads
        self.images = images

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the generators, and put each B at its map."""
        ports = open_ports(model.lm.model)
        g = self.width or (512 if model.lm.width >= 2048 else model.lm.width // 2)
        heads = self.heads or max(1, g // 32)
        if g % heads:
            raise UserError(f"fusion.heads={heads} does not divide fusion.width={g}; choose a divisor.")
        self.model_tokens = model.connector.tokens_per_image(model.encoder.hw), model.token_width
        self.chosen = chosen_layers(len(ports), self.every, self.layers)
        self.project = nn.Linear(model.token_width, g)
        self.places = nn.Parameter(torch.empty(self.model_tokens[0], g))
        self.generators = nn.ModuleDict()
        self.blocks = nn.ModuleDict()
        for kind in self.types:
            sizes = [_size(ports[layer], kind) for layer in self.chosen]
            if len({rows for rows, _ in sizes}) > 1:
                raise UserError(f"fusion.types: the maps {kind} of this lm differ in size; leave {kind} out.")
            self.generators[kind] = Generator(g, len(sizes), self.depth, heads, sizes[0][0], self.rank)
            self.blocks[kind] = nn.ModuleList(WeightDelta(out, self.rank, self.factor, self.images) for _, out in sizes)
            for k, (layer, block) in enumerate(zip(self.chosen, self._blocks(kind), strict=True)):
                ports[layer].put(PORTS[kind], block, f"{self.key}.{kind}.{k}")
        for module in (self.project, *self.generators.values()):
            _draw(module)
        nn.init.trunc_normal_(self.places, std=0.02)

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """A of every map, once per image."""
        sees, slots = sight(self.sees, batch)
        return {
            f"{self.key}.{kind}.{k}": Memory({"A": made[:, k]}, sees, slots)
            for kind, made in self.weights(seen).items()
            for k in range(len(self.chosen))
        }

    def weights(self, seen: Seen) -> dict[str, Tensor]:
        """A of the images by type, (I, K, Din, r)."""
        tokens = memory_tokens(seen, *self.model_tokens, self.project.weight)  # (I, M, Dt)
        looked = self.project(tokens) + self.places  # (I, M, g)
        return {kind: generator(looked) for kind, generator in self.generators.items()}

    @torch.no_grad()
    def merged(self, lm: PreTrainedModel, seen: Seen) -> PreTrainedModel:
        """A copy of the LM with the weights of one image put into its own, for many questions about that image.

        Its maps are W + (alpha / r) B A^T; beside a feed-forward network, whose two layers no single matrix goes
        into, the branch is given as one matrix. Every position has the weights, as under ``sees=sample``.

        Args:
            lm: the LM that this fusion is attached to (``model.lm.model``).
            seen: what the model saw of a batch of one image.

        Raises:
            ValueError: it saw none, or several.
        """
        if seen.tokens is None or len(seen.tokens) != 1:
            raise ValueError("weights are merged for one image; give what the model saw of a single one")
        twin = copy.deepcopy(lm)
        ports, made = open_ports(twin), self.weights(seen)
        for kind in self.types:
            for k, (layer, block) in enumerate(zip(self.chosen, self._blocks(kind), strict=True)):
                change = self.factor * block.B @ made[kind][0, k].T  # (Dout, Din)
                module = ports[layer].module(PORTS[kind])
                if kind == "m":
                    stack: Any = ports[layer].layer
                    stack.mlp = Beside(stack.mlp, change)
                else:
                    module.weight += change.to(module.weight.dtype)
        return twin

    def _blocks(self, kind: str) -> list[WeightDelta]:
        found = self.blocks[kind]
        assert isinstance(found, nn.ModuleList)
        return [block for block in found if isinstance(block, WeightDelta)]

    def waits(self, name: str) -> bool:
        """All but B."""
        return not name.endswith(".B")


class WeightDelta(nn.Module):
    """A block at a map: (alpha / r) (x A) B^T is added to its output."""

    def __init__(self, out: int, rank: int, factor: float, images: str) -> None:
        super().__init__()
        self.factor, self.images = factor, images
        self.B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor, out: Tensor, *, layout: Layout, memory: Memory) -> Tensor:
        """(B, Q, Din) and (B, Q, Dout) -> (B, Q, Dout)."""
        sees, images = seen_in_row(memory)  # (B, Q, J), (B, J)
        made = memory.tensors["A"]  # (I, Din, r)
        share = sees.to(x.dtype)
        if self.images == "mean":
            share = share / share.sum(-1, keepdim=True).clamp(min=1)
        each = made[images].transpose(1, 2).flatten(2)  # (B, Din, J * r)
        low = (x @ each).unflatten(-1, (images.shape[1], made.shape[-1]))  # (B, Q, J, r)
        low = (share[..., None] * low).sum(2) + 0.0 * made.sum()  # (B, Q, r); a gradient without images, too
        return out + self.factor * F.linear(low, self.B)


class Generator(nn.Module):
    """Makes A (I, K, Din, r) for the K layers of one type from the image (I, M, g)."""

    def __init__(self, width: int, layers: int, depth: int, heads: int, rows: int, rank: int) -> None:
        super().__init__()
        self.rows = rows
        self.queries = nn.Parameter(torch.empty(layers, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, layers > 1) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, rows * rank)

    def forward(self, image: Tensor) -> Tensor:
        """(I, M, g) -> (I, K, Din, r)."""
        states = self.queries.expand(len(image), -1, -1)  # (I, K, g)
        for layer in self.layers:
            states = layer(states, image)
        return self.out(self.norm(states)).unflatten(-1, (self.rows, -1))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int, many: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width) if many else None
        self.self_attention = Attention(width, heads) if many else None
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor, image: Tensor) -> Tensor:
        """(I, K, g) and (I, M, g) -> (I, K, g)."""
        if self.self_attention is not None and self.self_norm is not None:
            inner = self.self_norm(states)
            states = states + self.self_attention(inner, inner)
        states = states + self.cross_attention(self.cross_norm(states), image)
        return states + self.mlp(self.mlp_norm(states))


class Attention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """(I, K, g) and (I, N, g) -> (I, K, g)."""
        q, k, v = (
            part(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, given in ((self.q, x), (self.k, image), (self.v, image))
        )  # (I, H, K or N, g / H)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Beside(nn.Module):
    """A feed-forward network with one matrix (D, D) beside it."""

    def __init__(self, mlp: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.mlp = mlp
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        out: Tensor = self.mlp(x)
        return out + F.linear(x, self.weight)


def _size(ports: LayerPorts, kind: str) -> tuple[int, int]:
    """Input and output width of the maps of a type in a layer."""
    if PORTS[kind] not in ports.paths:
        left = " and ".join(k for k, port in PORTS.items() if port in ports.paths)
        raise UserError(
            f"fusion.types has {kind}, and the layers of this family of LMs have no such map of their own (theirs: "
            f"{', '.join(ports.paths)}); choose from {left}."
        )
    if kind == "m":
        first = ports.module("linear.gate" if "linear.gate" in ports.paths else "linear.gate_up")
        return int(first.in_features), int(ports.module("linear.down").out_features)
    module = ports.module(PORTS[kind])
    return int(module.in_features), int(module.out_features)


def _draw(module: nn.Module) -> None:
    """New weights as the released code draws them, a truncated normal of 0.02."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            nn.init.trunc_normal_(parameter, std=0.02)

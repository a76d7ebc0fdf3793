"""``deepstack``: earlier layers of the encoder, added at visual positions after the LM's first layers (Qwen3-VL)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Layout, Memory, Seen
from vlmlab.contracts.values import Layers, Width
from vlmlab.fusion.base import InSequence, at_their_places, beside, check_counts
from vlmlab.lm.inside import open_ports


class DeepStack(InSequence):
    """Visual tokens of the encoder's last listed layer in the sequence; earlier ones are added to their states inside.

    x <- x + merge_k(features of the encoder's k-th listed layer), at visual positions after the k-th of the LM's
    layers, as Qwen3-VL does (transformers' ``Qwen3VLModel``; the idea is DeepStack's, arXiv 2406.04334). merge_k is
    W_2 gelu(W_1 LN(z)), z being the features of all cells that become one token, side by side. The connector reads the
    last of ``encoder.layers`` alone. Where only one is listed it is added, too.

    Qwen3-VL starts with random W_2, and then as nothing else that is there: from the first step on something is added
    to the states. With `zero_start`, which is ours, W_2 and its bias start at zero, so that the composition starts as
    ``concat``; then they alone have a gradient, from step 1 all weights have.

    Parameters, a merge of r cells of width Dv: 2 r Dv + (r Dv h + h) + (h d + d).

    Args:
        layers: indices of the LM's layers after which the encoder's are added, in the encoder's order; null is the
            first ones, as in Qwen3-VL.
        hidden: h; null is r Dv, as in Qwen3-VL.
        zero_start: whether the merges start at zero.

    Raises:
        UserError: from ``attach``: other than one of the LM's layers for each of the encoder's, a layer that is not
            there or has none after it, or tokens that do not stand for equal blocks of the encoder's grid.
    """

    def __init__(self, layers: Layers | None = None, hidden: Width | None = None, zero_start: bool = False) -> None:
        super().__init__()
        check_counts(hidden=hidden)
        self.layers, self.hidden, self.zero_start = layers, hidden, zero_start
        self.starts_as = "concat" if zero_start else "nothing"

    def read_by_connector(self, grids: int) -> int:
        """The last one."""
        return 1

    def attach(self, model: VisionLanguageModel) -> None:
        """Make the merges and put a sum after each of the chosen layers."""
        super().attach(model)
        ports = open_ports(model.lm.model)
        widths = model.encoder.widths[: max(1, len(model.encoder.widths) - 1)]
        self.merges = nn.ModuleList(
            Merge(width, model.lm.width, self._cells(model), self.hidden, self.zero_start) for width in widths
        )
        for k, layer in enumerate(self._chosen(len(widths), len(ports))):
            ports[layer].put("after", add, f"{self.key}.{k}")
        self.cells = model.encoder.hw[0] * model.encoder.hw[1]

    def _chosen(self, taps: int, depth: int) -> list[int]:
        """An LM layer for each of the encoder's."""
        chosen = list(range(taps)) if self.layers is None else [layer % depth for layer in self.layers]
        told = f"fusion.layers={None if self.layers is None else list(self.layers)}"
        if len(set(chosen)) != taps:
            raise UserError(
                f"{told} names {len(set(chosen))} layers of the LM for {taps} of the encoder's; name {taps}."
            )
        if max(chosen) >= depth - 1 or any(not -depth <= layer < depth for layer in self.layers or ()):
            raise UserError(
                f"{told} adds {taps} of encoder.layers after the last of the LM's {depth} layers or further, where no "
                f"word looks any more; name layers from 0 to {depth - 2}."
            )
        return chosen

    def _cells(self, model: VisionLanguageModel) -> tuple[int, int, int, int]:
        """Rows of tokens, rows of cells of a token, columns of tokens, columns of cells of a token."""
        grid, hw = model.connector.grid(model.encoder.hw), model.encoder.hw
        if grid is None or hw[0] % grid[0] or hw[1] % grid[1]:
            raise UserError(
                f"fusion=deepstack adds features to tokens that stand for equal blocks of the encoder's {hw[0]}x{hw[1]}"
                " cells, and this connector's do not; use connector=mlp, linear, pixel_shuffle or pool."
            )
        return grid[0], hw[0] // grid[0], grid[1], hw[1] // grid[1]

    def memories(self, seen: Seen, batch: Batch) -> dict[str, Memory]:
        """What is added after every chosen layer, once per image."""
        shared = beside(batch, batch.layout.visual)
        made: dict[str, Memory] = {}
        for k, merge in enumerate(self.merges):
            assert isinstance(merge, Merge)
            if seen.visual is None:
                like = merge.down.weight
                features = torch.zeros(0, self.cells, merge.width, dtype=like.dtype, device=like.device)
            else:
                features = seen.visual.grids[k]
            made[f"{self.key}.{k}"] = replace(shared, tensors={"added": merge(features)})
        return made

    def waits(self, name: str) -> bool:
        """All but the last maps, where those start at zero."""
        return self.zero_start and ".down." not in name


class Merge(nn.Module):
    """Cells of a block side by side, a norm, two linear maps with GELU between."""

    def __init__(
        self, width: int, out: int, cells: tuple[int, int, int, int], hidden: int | None, zero_start: bool
    ) -> None:
        super().__init__()
        self.width, self.cells = width, cells
        wide = width * cells[1] * cells[3]
        self.norm = nn.LayerNorm(wide, eps=1e-6)
        self.up = nn.Linear(wide, hidden or wide)
        self.down = nn.Linear(hidden or wide, out)
        if zero_start:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(I, N, Dv) of all cells, row by row -> (I, M, D)."""
        blocks = features.unflatten(1, self.cells).movedim(3, 2)  # (I, R, C, r, c, Dv)
        x = blocks.flatten(3).flatten(1, 2)  # (I, M, r c Dv)
        return self.down(F.gelu(self.up(self.norm(x))))


def add(states: Tensor, *, layout: Layout, memory: Memory) -> Tensor:
    """(B, Q, D) states after a layer, with what is added at visual positions."""
    assert memory.split is not None
    added = at_their_places(memory.tensors["added"], layout, memory)  # (V, D)
    none = torch.zeros_like(states).flatten(0, 1)  # (B * Q, D)
    everywhere = none.index_copy(0, memory.split.here, added.to(states.dtype)).view_as(states)
    return states + everywhere  # no view of something, for which torch.compile would make another graph

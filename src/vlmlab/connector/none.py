"""``none``: the encoder's features as they are, for fusions that have a projection of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual


class NoConnector(Connector):
    """One visual token per feature, as wide as the features; it has no weights.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM, which is not used.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.in_width = in_width

    @property
    def width(self) -> int:
        """That of a feature."""
        return self.in_width

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per feature of the grid."""
        return hw[0] * hw[1]

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the features."""
        return hw

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, N, Dv) the features; the instruction is not used."""
        return torch.cat(visual.grids, -1)

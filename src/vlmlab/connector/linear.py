"""``linear``: one linear layer (LLaVA, arXiv 2304.08485 section 4.1; PaliGemma, arXiv 2407.07726 section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual


class LinearConnector(Connector):
    """One linear layer; one visual token per feature.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        zero: start with weight and bias 0, as PaliGemma does: every visual token is the zero vector at first.
    """

    def __init__(self, in_width: int, out_width: int, zero: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(in_width, out_width)
        if zero:
            for parameter in self.layer.parameters():
                nn.init.zeros_(parameter)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per feature of the grid."""
        return hw[0] * hw[1]

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the features."""
        return hw

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        return self.layer(torch.cat(visual.grids, -1))  # (I, N, Dv) -> (I, N, D)

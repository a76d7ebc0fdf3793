"""``pixel_shuffle``: neighbouring features side by side in one token (InternVL 1.5, arXiv 2404.16821 section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from vlmlab.connector.base import as_grid, check_counts, check_divides, windows
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class PixelShuffleConnector(Connector):
    """``factor`` x ``factor`` features become one token of as many times the channels; LayerNorm, Linear, GELU, Linear.

    Nothing is averaged: the shuffle can be inverted. Channels are ordered row, column, feature as in transformers'
    ``InternVLModel.pixel_shuffle``.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        factor: rows and columns of a window; 2 is InternVL's ``downsample_ratio`` of 0.5 (a quarter of the tokens).

    Raises:
        UserError: from ``tokens_per_image`` and ``forward``, where ``factor`` does not divide the grid, which
            InternVL refuses too.
    """

    def __init__(self, in_width: int, out_width: int, factor: Width = 2) -> None:
        super().__init__()
        check_counts(factor=factor)
        self.factor = factor
        wide = in_width * factor**2
        self.norm = nn.LayerNorm(wide)
        self.layers = nn.Sequential(nn.Linear(wide, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per window."""
        check_divides("factor", self.factor, hw)
        return hw[0] * hw[1] // self.factor**2

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the windows."""
        return hw[0] // self.factor, hw[1] // self.factor

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        grid = as_grid(visual)  # (I, R, C, Dv)
        check_divides("factor", self.factor, (grid.shape[1], grid.shape[2]))
        shuffled = windows(grid, self.factor, self.factor).flatten(3).flatten(1, 2)  # (I, M, f * f * Dv)
        return self.layers(self.norm(shuffled))  # (I, M, D)

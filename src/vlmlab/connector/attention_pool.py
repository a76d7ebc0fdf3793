"""``attention_pool``: attention inside small windows, their mean as the query (Molmo, arXiv 2409.17146 section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import as_grid, check_counts, check_heads, windows
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class AttentionPoolConnector(Connector):
    """One token per window: the window's mean attends to its features; then a SwiGLU MLP to the LM's width.

    A grid that the window does not divide is filled up at the bottom and right with places that neither the mean nor
    the attention sees, as in transformers' ``Molmo2Adapter``.

    Args:
        in_width: width of a feature, all tapped layers side by side (Molmo taps two).
        out_width: width of the LM.
        window: rows and columns of a window (2 in the paper).
        heads: attention heads (16 in the released models).
        width: of the attention (a feature of one layer in Molmo); null means `in_width`.
        hidden: width inside the MLP (that of the LM's own); null means four times the LM's.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        window: Width = 2,
        heads: Width = 16,
        width: Width | None = None,
        hidden: Width | None = None,
    ) -> None:
        super().__init__()
        inner = in_width if width is None else width
        wide = 4 * out_width if hidden is None else hidden
        check_counts(window=window, width=inner, hidden=wide)
        check_heads(heads, inner, "connector.width" if width is not None else "the feature width")
        self.window, self.heads = window, heads
        self.query = nn.Linear(in_width, inner)
        self.key = nn.Linear(in_width, inner)
        self.value = nn.Linear(in_width, inner)
        self.attended = nn.Linear(inner, inner)
        self.gate = nn.Linear(inner, wide, bias=False)
        self.up = nn.Linear(inner, wide, bias=False)
        self.down = nn.Linear(wide, out_width, bias=False)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """The grid divided by the window, rounded up on each side."""
        return -(-hw[0] // self.window) * -(-hw[1] // self.window)

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the windows."""
        return -(-hw[0] // self.window), -(-hw[1] // self.window)

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        grid = as_grid(visual)  # (I, R, C, Dv)
        features = self._windows(grid)  # (I, M, K, Dv) with K features in a window
        real = self._windows(torch.ones_like(grid[:1, :, :, :1]))  # (1, M, K, 1): 0 where filled up
        query = features.sum(2, keepdim=True) / real.sum(2, keepdim=True)  # (I, M, 1, Dv)
        pooled = F.scaled_dot_product_attention(
            self._split(self.query(query)),  # (I, M, heads, 1, W / heads)
            self._split(self.key(features)),  # (I, M, heads, K, W / heads)
            self._split(self.value(features)),
            attn_mask=real.bool().transpose(2, 3)[:, :, None],  # (1, M, 1, 1, K)
        )
        pooled = self.attended(pooled.flatten(2))  # (I, M, W)
        return self.down(F.silu(self.gate(pooled)) * self.up(pooled))  # (I, M, D)

    def _windows(self, grid: Tensor) -> Tensor:
        """(I, R, C, X) -> (I, M, K, X), filled up with zeros."""
        bottom, right = -grid.shape[1] % self.window, -grid.shape[2] % self.window
        return windows(F.pad(grid, (0, 0, 0, right, 0, bottom)), self.window, self.window).flatten(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        """(I, M, L, W) -> (I, M, heads, L, W / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(2, 3)

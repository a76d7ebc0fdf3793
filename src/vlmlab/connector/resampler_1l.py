"""``resampler_1l``: one position-aware cross-attention (Qwen-VL's adapter, arXiv 2308.12966 section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import as_grid, check_counts, check_heads
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class Resampler1lConnector(Connector):
    """A grid of learned queries reads the features once; fixed 2-D positions are added to queries and keys.

    As in the released code: features to the LM's width (where it differs) and LayerNorm; LayerNorm of the queries;
    attention whose values carry no position; LayerNorm and a linear layer after it. The queries' sine and cosine table
    is resized bicubically to the feature grid, so that query and key positions agree for any grid.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM; divisible by 4.
        side: rows and columns of queries (16 in the paper: 256 tokens).
        heads: attention heads (32 in the paper: 128 channels each).

    Raises:
        UserError: the LM's width cannot be split into heads or into sines and cosines of rows and columns.
    """

    positions: Tensor

    def __init__(self, in_width: int, out_width: int, side: Width = 16, heads: Width = 32) -> None:
        super().__init__()
        check_counts(side=side)
        check_heads(heads, out_width, "the LM's width")
        if out_width % 4:
            raise UserError(
                f"connector=resampler_1l needs an LM width divisible by 4, not {out_width}; choose another."
            )
        self.side = side
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(side**2, out_width), std=0.02))
        self.proj = nn.Identity() if in_width == out_width else nn.Linear(in_width, out_width, bias=False)
        self.query_norm = nn.LayerNorm(out_width, eps=1e-6)
        self.feature_norm = nn.LayerNorm(out_width, eps=1e-6)
        self.attention = nn.MultiheadAttention(out_width, heads, batch_first=True)
        self.out_norm = nn.LayerNorm(out_width, eps=1e-6)
        self.out = nn.Linear(out_width, out_width, bias=False)
        nn.init.normal_(self.out.weight, std=out_width**-0.5)
        self.register_buffer("positions", sine_cosine_2d(side, out_width), persistent=False)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per query, whatever the grid."""
        return self.side**2

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        grid = as_grid(visual)  # (I, R, C, Dv)
        values = self.feature_norm(self.proj(grid.flatten(1, 2)))  # (I, N, D)
        keys = values + self._resized(grid.shape[1], grid.shape[2]).to(values.dtype)
        queries = self.query_norm(self.query) + self.positions.flatten(0, 1).to(values.dtype)  # (M, D)
        queries = queries.expand(values.shape[0], -1, -1)  # (I, M, D)
        tokens, _ = self.attention(queries, keys, values, need_weights=False)
        return self.out(self.out_norm(tokens))  # (I, M, D)

    def _resized(self, rows: int, columns: int) -> Tensor:
        """(N, D): the table of positions at the size of the feature grid."""
        if (rows, columns) == (self.side, self.side):
            return self.positions.flatten(0, 1)
        table = self.positions.float().permute(2, 0, 1)[None]  # (1, D, side, side)
        return F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)[0].flatten(1).T


def sine_cosine_2d(side: int, width: int) -> Tensor:
    """(side, side, width): half the channels speak of the column, half of the row (as in MAE, arXiv 2111.06377)."""
    quarter = torch.arange(width // 4, dtype=torch.float64)
    angles = torch.arange(side, dtype=torch.float64)[:, None] / 10000 ** (quarter / (width // 4))  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], -1)  # (side, width / 2)
    column, row = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).float()  # (side, side, width)

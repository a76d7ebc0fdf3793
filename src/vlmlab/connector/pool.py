"""``pool``: average over windows of the feature grid, then a small MLP (InfMLLM's pool-adapter, arXiv 2311.06791)."""

from __future__ import annotations

from torch import Tensor, nn

from vlmlab.connector.base import as_grid, check_counts, windows
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class PoolConnector(Connector):
    """Mean of each window, then Linear, GELU, Linear; ``side`` x ``side`` visual tokens in the order of the grid.

    With ``side`` equal to the grid's this is the two-layer MLP connector.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        side: rows and columns of tokens; null halves the grid.
        norm: LayerNorm of the features first, for towers that do not end in one (EVA-CLIP's ``ln_vision``).

    Raises:
        UserError: from ``tokens_per_image`` and ``forward``, where ``side`` does not divide the grid; the released
            code has no other case either.
    """

    def __init__(self, in_width: int, out_width: int, side: Width | None = None, norm: bool = False) -> None:
        super().__init__()
        if side is not None:
            check_counts(side=side)
        self.side = side
        self.norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per window."""
        height, width = self._window(hw)
        return (hw[0] // height) * (hw[1] // width)

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the windows."""
        height, width = self._window(hw)
        return hw[0] // height, hw[1] // width

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        grid = self.norm(as_grid(visual))  # (I, R, C, Dv)
        pooled = windows(grid, *self._window((grid.shape[1], grid.shape[2]))).mean(3)  # (I, R', C', Dv)
        return self.layers(pooled.flatten(1, 2))  # (I, M, D)

    def _window(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of features that become one token."""
        tokens = (hw[0] // 2, hw[1] // 2) if self.side is None else (self.side, self.side)
        if 0 in tokens or hw[0] % tokens[0] or hw[1] % tokens[1]:
            asked = "null (half the grid)" if self.side is None else self.side
            raise UserError(
                f"connector.side={asked} does not divide the {hw[0]}x{hw[1]} feature grid; "
                "set connector.side to a number that divides both sides."
            )
        return hw[0] // tokens[0], hw[1] // tokens[1]

"""``ldp_v2``: MobileVLM V2's lightweight downsample projector (arXiv 2402.03766 section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import as_grid, check_counts
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class LdpV2Connector(Connector):
    """Linear, GELU, Linear per feature; the mean of each window; a depthwise 3x3 convolution added to it.

    The convolution encodes a token's position (PEG, arXiv 2102.10882). Windows at the end of a side that the window
    does not divide are cut off by the grid's edge, so that a side rounds up.

    Parameters: (Dv + 1) D + (D + 1) D + 10 D.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        window: rows and columns of features that become a token (2 in the paper: a quarter of the tokens).
    """

    def __init__(self, in_width: int, out_width: int, window: Width = 2) -> None:
        super().__init__()
        check_counts(window=window)
        self.window = window
        self.layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.position = nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per window."""
        rows, columns = self.grid(hw)
        return rows * columns

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the windows."""
        return -(-hw[0] // self.window), -(-hw[1] // self.window)

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = self.layers(as_grid(visual)).permute(0, 3, 1, 2)  # (I, R, C, Dv) -> (I, D, R, C)
        pooled = F.avg_pool2d(features, self.window, ceil_mode=True)  # (I, D, R', C')
        return (pooled + self.position(pooled)).flatten(2).transpose(1, 2)  # (I, M, D)

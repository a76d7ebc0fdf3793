"""``c_abstractor``: Honeybee's convolutional abstractor (arXiv 2312.06742 section 3.3)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import ChannelNorm, as_grid, check_counts
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Depth, Width


class CAbstractorConnector(Connector):
    """Residual blocks, adaptive average pooling to any number of tokens, as many residual blocks, and an MLP.

    A token stands for its own part of the picture and has seen its neighbourhood, whatever the number of tokens. The
    blocks are RegNet's (arXiv 2003.13678) with squeeze and excitation; the released code has depthwise convolutions in
    them, SiLU, and LayerNorm over the channels.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        side: rows and columns of tokens (12 in the paper: 144 tokens); null halves the grid, rounded up.
        hidden: channels of the blocks (1,024 in the paper); null means the LM's width.
        depth: blocks before the pooling, and as many after it (3 in the paper).
        mlp_depth: linear layers at the end, with SiLU between them (2 in the paper).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        side: Width | None = 12,
        hidden: Width | None = None,
        depth: Depth = 3,
        mlp_depth: Depth = 2,
    ) -> None:
        super().__init__()
        check_counts(**({} if side is None else {"side": side}), depth=depth, mlp_depth=mlp_depth)
        self.side = side
        width = hidden or out_width
        widths = [in_width, *[width] * depth]
        self.before = nn.Sequential(*[RegNetBlock(a, b) for a, b in pairwise(widths)])
        self.behind = nn.Sequential(*[RegNetBlock(width, width) for _ in range(depth)])
        layers: list[nn.Module] = [nn.Linear(width, out_width)]
        for _ in range(mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """One token per place of the pooled grid."""
        rows, columns = self.grid(hw)
        return rows * columns

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """The pooled grid."""
        return (-(-hw[0] // 2), -(-hw[1] // 2)) if self.side is None else (self.side, self.side)

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = as_grid(visual)  # (I, R, C, Dv)
        tokens = self.grid((features.shape[1], features.shape[2]))
        seen = self.before(features.permute(0, 3, 1, 2))  # (I, W, R, C)
        pooled = self.behind(F.adaptive_avg_pool2d(seen, tokens))  # (I, W, R', C')
        return self.layers(pooled.flatten(2).transpose(1, 2))  # (I, M, D)


class RegNetBlock(nn.Module):
    """1x1, depthwise 3x3, squeeze and excitation, 1x1, each convolution with a norm, beside a shortcut; then SiLU.

    The shortcut is the input, or a 1x1 convolution of it with a norm where the width changes.

    Args:
        in_width: channels of the input.
        width: channels of the output.
    """

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        squeezed = max(1, round(in_width / 4))
        self.enter = nn.Conv2d(in_width, width, 1, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.leave = nn.Conv2d(width, width, 1, bias=False)
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(3))
        self.squeeze, self.excite = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)
        self.shortcut = nn.Identity() if in_width == width else nn.Sequential(
            nn.Conv2d(in_width, width, 1, bias=False), ChannelNorm(width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(I, C, R, C) -> (I, W, R, C)."""
        y = F.silu(self.norms[0](self.enter(x)))
        y = F.silu(self.norms[1](self.depthwise(y)))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()  # (I, W, 1, 1)
        return F.silu(self.norms[2](self.leave(y * gate)) + self.shortcut(x))

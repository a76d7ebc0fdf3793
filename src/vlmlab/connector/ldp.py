"""``ldp``: MobileVLM's lightweight downsample projector (arXiv 2312.16886 section 3.4), as in PALO (2402.14818)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.base import ChannelNorm, as_grid, check_counts
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Width


class LdpConnector(Connector):
    """Linear, GELU, Linear per feature, then two depthwise-separable convolutions, the second with a stride.

    The convolutions pad by one, so that a side of odd length rounds up.

    Args:
        in_width: width of a feature (all tapped layers side by side).
        out_width: width of the LM.
        stride: of the second convolution, in rows and columns (2 in the paper: a quarter of the tokens).
    """

    def __init__(self, in_width: int, out_width: int, stride: Width = 2) -> None:
        super().__init__()
        check_counts(stride=stride)
        self.stride = stride
        self.layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.blocks = nn.Sequential(SeparableBlock(out_width, 1, residual=True), SeparableBlock(out_width, stride))

    def tokens_per_image(self, hw: tuple[int, int]) -> int:
        """The grid divided by the stride, rounded up on each side."""
        return -(-hw[0] // self.stride) * -(-hw[1] // self.stride)

    def grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        """That of the features divided by the stride, rounded up."""
        return -(-hw[0] // self.stride), -(-hw[1] // self.stride)

    def forward(self, visual: Visual, instruction: Tensor | None = None) -> Tensor:
        """(I, M, D) visual tokens; the instruction is not used."""
        features = self.layers(as_grid(visual)).permute(0, 3, 1, 2)  # (I, R, C, Dv) -> (I, D, R, C)
        return self.blocks(features).flatten(2).transpose(1, 2)  # (I, D, R', C') -> (I, M, D)


class SeparableBlock(nn.Module):
    """MobileNetV3's inverted residual without expansion, with LayerNorm over the channels in place of BatchNorm.

    Depthwise 3x3, norm, Hardswish; squeeze and excitation; pointwise 1x1, norm.

    Args:
        width: channels.
        stride: of the depthwise convolution.
        residual: add the input (MobileNetV3 does where the stride is 1).
    """

    def __init__(self, width: int, stride: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.depthwise_norm = ChannelNorm(width)
        squeezed = rounded_to_eight(width // 4)
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, width, 1)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.pointwise_norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(I, D, R, C) -> (I, D, R / stride, C / stride), rounded up."""
        y = F.hardswish(self.depthwise_norm(self.depthwise(x)))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))  # (I, D, 1, 1)
        y = self.pointwise_norm(self.pointwise(y * gate))
        return x + y if self.residual else y


def rounded_to_eight(width: int) -> int:
    """The nearest multiple of 8 that is at least 8 and not under 90 % of `width` (MobileNetV3's rule)."""
    near = max(8, (width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near

"""Both convolution blocks of the downsample projector, one output place at a time."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch import Tensor
from torch.nn import functional as F

from vlmlab.connector.ldp import LdpConnector, SeparableBlock, rounded_to_eight


def by_hand(block: SeparableBlock, x: Tensor, stride: int) -> Tensor:
    """(D, R, C) -> (D, R', C'), written place by place."""
    width, rows, columns = x.shape
    out = torch.zeros(width, -(-rows // stride), -(-columns // stride))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            for a in range(3):
                for b in range(3):
                    row, column = i * stride + a - 1, j * stride + b - 1
                    if 0 <= row < rows and 0 <= column < columns:
                        out[:, i, j] += block.depthwise.weight[:, 0, a, b] * x[:, row, column]
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            norm = block.depthwise_norm
            normed = F.layer_norm(out[:, i, j], (width,), norm.weight, norm.bias)
            out[:, i, j] = normed * (normed + 3).clamp(0, 6) / 6
    squeezed = (block.squeeze.weight[:, :, 0, 0] @ out.mean((1, 2)) + block.squeeze.bias).clamp(min=0)
    gate = ((block.excite.weight[:, :, 0, 0] @ squeezed + block.excite.bias + 3) / 6).clamp(0, 1)
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            mixed = block.pointwise.weight[:, :, 0, 0] @ (gate * out[:, i, j])
            out[:, i, j] = F.layer_norm(mixed, (width,), block.pointwise_norm.weight, block.pointwise_norm.bias)
    return out + x if block.residual else out


@pytest.mark.parametrize("hw", [(4, 4), (3, 4), (5, 5)], ids=str)
@torch.no_grad()
def test_every_place_by_a_plain_loop(hw: tuple[int, int]) -> None:
    connector = spread(LdpConnector(32, 24), scale=0.3)
    seen = visual(hw=hw)
    got = connector(seen)
    for image in range(2):
        grid = connector.layers(seen.grids[0][image]).T.unflatten(1, hw)  # (D, R, C)
        first = by_hand(connector.blocks[0], grid, stride=1)
        want = by_hand(connector.blocks[1], first, stride=2).flatten(1).T
        assert worst(got[image], want) < 1e-5
    assert connector.tokens_per_image(hw) == got.shape[1]
    assert connector.tokens_per_image((24, 24)) == 144, "336 px and patches of 14: a quarter of 576"


def test_the_squeezed_width_is_mobilenets() -> None:
    assert [rounded_to_eight(width) for width in (4, 8, 11, 12, 20, 512)] == [8, 8, 16, 16, 24, 512]

"""A residual block place by place, and what is around it."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch import Tensor
from torch.nn import functional as F

from vlmlab.connector.c_abstractor import CAbstractorConnector, RegNetBlock


def by_hand(block: RegNetBlock, x: Tensor) -> Tensor:
    """(C, R, K) -> (W, R, K), written place by place."""
    _, rows, columns = x.shape

    def normed(norm: int, at: Tensor) -> Tensor:
        own = block.norms[norm]
        return F.layer_norm(at, own.normalized_shape, own.weight, own.bias)

    places = [(i, j) for i in range(rows) for j in range(columns)]
    entered = {(i, j): F.silu(normed(0, block.enter.weight[:, :, 0, 0] @ x[:, i, j])) for i, j in places}
    mixed = {}
    for i, j in places:
        near = ((a, b, entered.get((i + a - 1, j + b - 1))) for a in range(3) for b in range(3))
        sums = [block.depthwise.weight[:, 0, a, b] * at for a, b, at in near if at is not None]
        mixed[i, j] = F.silu(normed(1, torch.stack(sums).sum(0)))
    squeezed = F.silu(block.squeeze.weight[:, :, 0, 0] @ torch.stack([*mixed.values()]).mean(0) + block.squeeze.bias)
    gate = (block.excite.weight[:, :, 0, 0] @ squeezed + block.excite.bias).sigmoid()
    out = torch.zeros(block.leave.out_channels, rows, columns)
    for i, j in places:
        direct = x[:, i, j]
        if len([*block.shortcut.parameters()]):
            conv, norm = block.shortcut
            direct = F.layer_norm(conv.weight[:, :, 0, 0] @ direct, norm.normalized_shape, norm.weight, norm.bias)
        out[:, i, j] = F.silu(normed(2, block.leave.weight[:, :, 0, 0] @ (gate * mixed[i, j])) + direct)
    return out


@pytest.mark.parametrize("hw", [(4, 4), (3, 5)], ids=str)
@torch.no_grad()
def test_every_place_by_a_plain_loop(hw: tuple[int, int]) -> None:
    connector = spread(CAbstractorConnector(32, 24, side=None, hidden=20, depth=2), scale=0.3)
    seen = visual(hw=hw)
    got = connector(seen)
    rows, columns = connector.grid(hw)
    for image in range(2):
        grid = seen.grids[0][image].T.unflatten(1, hw)  # (Dv, R, C)
        for block in connector.before:
            grid = by_hand(block, grid)
        pooled = torch.zeros(20, rows, columns)
        for i in range(rows):
            for j in range(columns):
                ends = [(k * n // m, -(-(k + 1) * n // m)) for k, n, m in ((i, hw[0], rows), (j, hw[1], columns))]
                pooled[:, i, j] = grid[:, slice(*ends[0]), slice(*ends[1])].mean((1, 2))
        for block in connector.behind:
            pooled = by_hand(block, pooled)
        first, _, second = connector.layers
        want = second(F.silu(first(pooled.flatten(1).T)))
        assert worst(got[image], want) < 1e-4
    assert connector.tokens_per_image(hw) == got.shape[1]


def test_any_number_of_tokens() -> None:
    connector = CAbstractorConnector(32, 24, side=3, depth=1)
    for hw in ((4, 4), (7, 5)):
        assert connector.tokens_per_image(hw) == 9 and connector(visual(hw=hw)).shape == (3, 9, 24)

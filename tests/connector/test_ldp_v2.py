"""Window means and the convolution after them, one output place at a time."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst

from vlmlab.connector.ldp_v2 import LdpV2Connector


@pytest.mark.parametrize("hw", [(4, 4), (3, 5)], ids=str)
@torch.no_grad()
def test_every_place_by_a_plain_loop(hw: tuple[int, int]) -> None:
    connector = spread(LdpV2Connector(32, 24), scale=0.3)
    seen = visual(hw=hw)
    got = connector(seen)
    rows, columns = connector.grid(hw)
    for image in range(2):
        grid = connector.layers(seen.grids[0][image]).unflatten(0, hw)  # (R, C, D)
        pooled = {
            (i, j): grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for i in range(rows) for j in range(columns)
        }
        for (i, j), own in pooled.items():
            want = own + connector.position.bias
            for a in range(3):
                for b in range(3):
                    near = pooled.get((i + a - 1, j + b - 1))
                    want = want + (0 if near is None else connector.position.weight[:, 0, a, b] * near)
            assert worst(got[image, i * columns + j], want) < 1e-5
    assert connector.tokens_per_image(hw) == got.shape[1] == rows * columns
    assert connector.tokens_per_image((24, 24)) == 144, "336 px and patches of 14: a quarter of 576"
    assert sum(p.numel() for p in connector.parameters()) == 33 * 24 + 25 * 24 + 10 * 24

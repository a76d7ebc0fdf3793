"""The shuffle as a plain loop, undone again."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch.nn import functional as F

from vlmlab.connector.base import as_grid, windows
from vlmlab.connector.pixel_shuffle import PixelShuffleConnector
from vlmlab.contracts.errors import UserError


@pytest.mark.parametrize(("hw", "factor"), [((4, 4), 2), ((2, 6), 2), ((3, 6), 3)], ids=str)
@torch.no_grad()
def test_every_token_by_a_plain_loop(hw: tuple[int, int], factor: int) -> None:
    connector = spread(PixelShuffleConnector(32, 24, factor))
    seen = visual(hw=hw)
    want = []
    for row in range(0, hw[0], factor):
        for column in range(0, hw[1], factor):
            cells = [(row + i) * hw[1] + column + j for i in range(factor) for j in range(factor)]
            side_by_side = torch.cat([seen.grids[0][:, cell] for cell in cells], -1)  # (I, f * f * Dv)
            norm = connector.norm
            want.append(connector.layers(F.layer_norm(side_by_side, side_by_side.shape[1:], norm.weight, norm.bias)))
    assert worst(connector(seen), torch.stack(want, 1)) < 1e-5
    assert connector.tokens_per_image(hw) == len(want) == hw[0] * hw[1] // factor**2


def test_the_shuffle_loses_nothing() -> None:
    grid = as_grid(visual(layers=2, hw=(4, 6)))  # (I, 4, 6, 64)
    back = windows(grid, 2, 3).unflatten(3, (2, 3)).transpose(2, 3).reshape(grid.shape)
    assert torch.equal(back, grid)


def test_an_odd_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.factor=2 does not divide the 27x27 feature grid"):
        PixelShuffleConnector(32, 24).tokens_per_image((27, 27))

"""Windows averaged by a plain loop, the special case that is the MLP connector, and transformers' pooling."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst

from vlmlab.connector.mlp import MlpConnector
from vlmlab.connector.pool import PoolConnector
from vlmlab.contracts.errors import UserError


@pytest.mark.parametrize(
    ("hw", "side", "height", "width"), [((4, 4), 2, 2, 2), ((4, 6), 2, 2, 3), ((6, 4), None, 2, 2)]
)
@torch.no_grad()
def test_every_window_by_a_plain_loop(hw: tuple[int, int], side: int | None, height: int, width: int) -> None:
    connector = spread(PoolConnector(32, 24, side=side))
    seen = visual(hw=hw)
    want = []
    for top in range(0, hw[0], height):
        for left in range(0, hw[1], width):
            cells = [(top + i) * hw[1] + left + j for i in range(height) for j in range(width)]
            want.append(connector.layers(sum(seen.grids[0][:, cell] for cell in cells) / len(cells)))
    assert worst(connector(seen), torch.stack(want, 1)) < 1e-5


@torch.no_grad()
def test_windows_of_one_feature_are_the_mlp_connector() -> None:
    connector, mlp = spread(PoolConnector(64, 24, side=4)), MlpConnector(64, 24)
    mlp.layers.load_state_dict(connector.layers.state_dict())
    assert torch.equal(connector(visual(layers=2)), mlp(visual(layers=2)))


@torch.no_grad()
def test_the_norm_comes_first() -> None:
    connector = spread(PoolConnector(32, 24, side=1, norm=True))
    seen = visual()
    normed = torch.nn.functional.layer_norm(seen.grids[0], (32,), connector.norm.weight, connector.norm.bias)
    assert worst(connector(seen)[:, 0], connector.layers(normed.mean(1))) < 1e-5


def test_a_side_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.side=3 does not divide the 4x4 feature grid"):
        PoolConnector(32, 24, side=3).tokens_per_image((4, 4))
    with pytest.raises(UserError, match=r"connector\.side=null \(half the grid\) does not divide the 27x27"):
        PoolConnector(32, 24).tokens_per_image((27, 27))
    assert PoolConnector(32, 24, side=9).tokens_per_image((27, 27)) == 81
    with pytest.raises(UserError, match=r"connector\.side=0 is not possible"):
        PoolConnector(32, 24, side=0)

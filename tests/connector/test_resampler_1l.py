"""The position-aware cross-attention as a plain loop; the table of sines and cosines value by value."""

from __future__ import annotations

import math

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.resampler_1l import Resampler1lConnector, sine_cosine_2d
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Visual


def test_the_table_of_positions() -> None:
    table = sine_cosine_2d(3, 8)
    for row in range(3):
        for column in range(3):
            want = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 2) for i in range(2)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert worst(table[row, column], torch.tensor(want)) < 1e-6


@pytest.mark.parametrize("hw", [(2, 2), (3, 5)], ids=str)
@torch.no_grad()
def test_every_token_by_a_plain_loop(hw: tuple[int, int]) -> None:
    connector = spread(Resampler1lConnector(32, 24, side=2, heads=2))
    seen = visual(hw=hw)
    table = sine_cosine_2d(2, 24)
    resized = F.interpolate(table.permute(2, 0, 1)[None], size=hw, mode="bicubic")  # (1, D, R, C)
    places = resized[0].flatten(1).T if hw != (2, 2) else table.flatten(0, 1)
    part = connector.attention

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, (24,), layer.weight, layer.bias, 1e-6)

    def project(which: int, x: Tensor) -> Tensor:
        mine = slice(which * 24, which * 24 + 24)
        return part.in_proj_weight[mine] @ x + part.in_proj_bias[mine]

    values = [norm(connector.feature_norm, connector.proj.weight @ x) for x in seen.grids[0][0]]
    keys = [value + place for value, place in zip(values, places, strict=True)]
    for index in range(4):
        query = project(0, norm(connector.query_norm, connector.query[index]) + table.flatten(0, 1)[index])
        heads = []
        for head in range(2):
            mine = slice(head * 12, head * 12 + 12)
            weights = torch.stack([query[mine] @ project(1, key)[mine] / math.sqrt(12) for key in keys]).exp()
            terms = zip(weights / weights.sum(), values, strict=True)
            heads.append(sum(w * project(2, value)[mine] for w, value in terms))
        out = part.out_proj.weight @ torch.cat(heads) + part.out_proj.bias
        want = connector.out.weight @ norm(connector.out_norm, out)
        assert worst(connector(seen)[0, index], want) < 1e-5


@torch.no_grad()
def test_positions_make_the_order_matter() -> None:
    connector = spread(Resampler1lConnector(32, 24, side=2, heads=2), scale=0.5)
    seen = visual()
    moved = Visual([seen.grids[0].roll(1, 1)], None, seen.hw)
    assert worst(connector(seen), connector(moved)) > 1e-3
    connector.positions.zero_()
    assert worst(connector(seen), connector(moved)) < 1e-5


def test_the_table_is_no_weight() -> None:
    connector = Resampler1lConnector(24, 24, side=2, heads=2)
    assert "positions" not in connector.state_dict()
    assert isinstance(connector.proj, torch.nn.Identity), "equal widths need no projection, as in the released code"


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.heads=5 does not divide the LM's width of 24"):
        Resampler1lConnector(32, 24, heads=5)
    with pytest.raises(UserError, match="divisible by 4, not 30"):
        Resampler1lConnector(32, 30, heads=2)

"""The prefix written as a loop, and the linear connector that starts at zero."""

from __future__ import annotations

import torch
from tests.tiny import spread, worst

from vlmlab.connector.linear import LinearConnector
from vlmlab.connector.prefix import PrefixConnector
from vlmlab.contracts.tensors import Visual


def visual() -> Visual:
    grids = [torch.randn(3, 4, width, generator=torch.Generator().manual_seed(width)) for width in (5, 6)]
    return Visual(grids=grids, pooled=None, hw=torch.tensor([[2, 2]] * 3))


@torch.no_grad()
def test_a_prefix_is_a_linear_map_of_the_mean_feature() -> None:
    connector = spread(PrefixConnector(11, 7, tokens=2))
    seen = visual()
    got = connector(seen)
    for image in range(3):
        features = torch.cat([grid[image] for grid in seen.grids], -1)  # (N, Dv)
        mean = sum(features) / 4
        for token in range(2):
            rows = slice(token * 7, token * 7 + 7)
            want = connector.proj.weight[rows] @ mean + connector.proj.bias[rows]
            assert worst(got[image, token], want) < 1e-6


def test_linear_can_start_at_zero_and_still_learns() -> None:
    connector = LinearConnector(11, 7, zero=True)
    tokens = connector(visual())
    assert not tokens.any()
    (tokens * torch.randn(tokens.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in connector.parameters())

"""The pooling of one window as a plain loop, also where the grid's edge cuts it."""

from __future__ import annotations

import math

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst

from vlmlab.connector.attention_pool import AttentionPoolConnector
from vlmlab.contracts.errors import UserError


@pytest.mark.parametrize("hw", [(4, 4), (3, 5)], ids=str)
@torch.no_grad()
def test_every_window_by_a_plain_loop(hw: tuple[int, int]) -> None:
    connector = spread(AttentionPoolConnector(64, 24, heads=2, width=16, hidden=20))
    seen = visual(layers=2, hw=hw)
    features = torch.cat(seen.grids, -1)[0]  # (N, Dv)
    got, token = connector(seen)[0], 0
    for top in range(0, hw[0], 2):
        for left in range(0, hw[1], 2):
            inside = [(i, j) for i in (top, top + 1) for j in (left, left + 1) if i < hw[0] and j < hw[1]]
            cells = [features[i * hw[1] + j] for i, j in inside]
            query = connector.query(sum(cells) / len(cells))
            heads = []
            for head in range(2):
                mine = slice(head * 8, head * 8 + 8)
                weights = torch.stack([query[mine] @ connector.key(x)[mine] / math.sqrt(8) for x in cells]).exp()
                terms = zip(weights / weights.sum(), cells, strict=True)
                heads.append(sum(w * connector.value(x)[mine] for w, x in terms))
            pooled = connector.attended(torch.cat(heads))
            gate = connector.gate.weight @ pooled
            want = connector.down.weight @ (gate * gate.sigmoid() * (connector.up.weight @ pooled))
            assert worst(got[token], want) < 1e-5
            token += 1
    assert token == got.shape[0] == connector.tokens_per_image(hw)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.heads=5 does not divide the feature width of 32"):
        AttentionPoolConnector(32, 24, heads=5)
    with pytest.raises(UserError, match=r"connector\.heads=4 does not divide connector\.width of 18"):
        AttentionPoolConnector(32, 24, heads=4, width=18)

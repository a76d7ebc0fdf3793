"""Four neighbours in reading order become one token."""

from __future__ import annotations

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst

from vlmlab.connector.token_concat import TokenConcatConnector
from vlmlab.contracts.errors import UserError


@torch.no_grad()
def test_every_token_by_a_plain_loop() -> None:
    connector = spread(TokenConcatConnector(64, 24, group=4))
    seen = visual(layers=2)
    features = torch.cat(seen.grids, -1)  # (I, N, Dv)
    want = torch.zeros(3, 4, 24)
    for image in range(3):
        for token in range(4):
            want[image, token] = connector.proj.bias
            for place in range(4):
                weight = connector.proj.weight[:, place * 64 : place * 64 + 64]
                want[image, token] += weight @ features[image, 4 * token + place]
    assert worst(connector(seen), want) < 1e-5
    assert connector.tokens_per_image((32, 32)) == 256, "the paper's 448 px"


def test_a_remainder_is_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.group=4 does not divide the 9 features"):
        TokenConcatConnector(32, 24).tokens_per_image((3, 3))

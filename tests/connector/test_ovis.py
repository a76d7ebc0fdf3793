"""Ovis's visual words by plain loops, in its three ways to choose them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch.nn import functional as F

from vlmlab.connector.ovis import OvisConnector
from vlmlab.contracts.errors import UserError


def connector(**changes: Any) -> OvisConnector:
    return spread(OvisConnector(32, 24, **{"words": 12, **changes}))


@torch.no_grad()
def test_a_token_is_a_mixture_of_table_rows() -> None:
    ours = connector()
    tokens, features = ours(visual()), visual().grids[0]
    assert tokens.shape[1] == ours.tokens_per_image((4, 4)) == 18
    for image in range(3):
        for place in range(16):
            logits = F.layer_norm(ours.head.weight @ features[image, place], (12,), ours.norm.weight, ours.norm.bias)
            share = logits.exp() / logits.exp().sum()
            want = sum(p * row for p, row in zip(share, ours.table.weight, strict=False))
            assert worst(tokens[image, 1 + place], want) < 1e-5
        assert torch.equal(tokens[image, 0], ours.table.weight[12]), "an image begins"
        assert torch.equal(tokens[image, -1], ours.table.weight[13]), "an image ends"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokenize", ["softmax", "gumbel_argmax", "st_argmax"])
@torch.no_grad()
def test_probabilities_sum_to_one_and_an_integer_is_a_lookup(tokenize: str, training: bool) -> None:
    ours = connector(tokenize=tokenize, indicators=False).train(training)
    torch.manual_seed(0)
    p = ours.probabilities(visual())
    assert p.dtype == torch.float32 and worst(p.sum(-1), torch.ones(3, 16)) < 1e-6
    if tokenize == "softmax":
        return
    assert worst(p.max(-1).values, torch.ones(3, 16)) < 1e-6
    torch.manual_seed(0)
    assert worst(ours(visual()), ours.table(p.argmax(-1))) < 1e-6
    likeliest = torch.equal(p.argmax(-1), connector().probabilities(visual()).argmax(-1))
    assert likeliest == (tokenize == "st_argmax" or not training), "only gumbel draws, and only in training"


def test_a_hard_choice_has_the_gradient_of_the_soft_one() -> None:
    hard, soft = connector(tokenize="st_argmax"), connector()
    for ours in (hard, soft):
        (ours.probabilities(visual()) * torch.arange(12.0)).sum().backward()
    assert worst(hard.head.weight.grad, soft.head.weight.grad) < 1e-6


@pytest.mark.parametrize("hw", [(4, 4), (3, 5)])
@torch.no_grad()
def test_blocks_of_features_side_by_side(hw: tuple[int, int]) -> None:
    ours = connector(stride=2, indicators=False)
    seen = visual(hw=hw)
    down, across = -(-hw[0] // 2), -(-hw[1] // 2)
    p = ours.probabilities(seen)
    assert p.shape[1] == ours.tokens_per_image(hw) == down * across
    for place in range(down * across):
        row, column = divmod(place, across)
        corner = [(2 * row + r, 2 * column + c) for r in range(2) for c in range(2)]
        side_by_side = torch.cat(
            [seen.grids[0][:, r * hw[1] + c] if r < hw[0] and c < hw[1] else torch.zeros(3, 32) for r, c in corner], -1
        )
        logits = F.layer_norm(side_by_side @ ours.head.weight.T, (12,), ours.norm.weight, ours.norm.bias)
        assert worst(p[:, place], logits.softmax(-1)) < 1e-5


def test_wrong_keys_are_refused() -> None:
    with pytest.raises(UserError, match="softmax, gumbel_argmax, st_argmax"):
        connector(tokenize="hard")
    with pytest.raises(UserError, match=r"connector\.stride=0"):
        connector(stride=0)


def test_indicators_have_no_place_in_the_grid() -> None:
    for stride, want in ((1, (3, 5)), (2, (2, 3))):
        alone = OvisConnector(32, 24, words=8, stride=stride, indicators=False)
        assert alone.grid((3, 5)) == want and alone.tokens_per_image((3, 5)) == want[0] * want[1]
        assert OvisConnector(32, 24, words=8, stride=stride).grid((3, 5)) is None

"""LLaMA-VID's two tokens by plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch.nn import functional as F

from vlmlab.connector.qformer import QFormerConnector
from vlmlab.connector.two_token import TwoTokenConnector
from vlmlab.contracts.errors import UserError

IDS = torch.tensor([[7, 8, -1], [9, 8, 7], [-1, -1, -1]])
SIZES = {"queries": 5, "hidden": 16, "layers": 2, "heads": 2, "vocab_size": 20, "max_words": 8}


def connector(**changes: Any) -> TwoTokenConnector:
    return spread(TwoTokenConnector(32, 24, **{**SIZES, **changes}))


@torch.no_grad()
def test_the_context_token_by_plain_loops() -> None:
    ours = connector()
    qformer = QFormerConnector(32, 32, instruction=True, **SIZES).eval()  # from the text back to the features' width
    missing, _ = qformer.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    asked, features = qformer(visual(), IDS), visual().grids[0]
    got = ours(visual(), IDS)
    for image in range(3):
        keys = [ours.key.weight @ x + ours.key.bias for x in features[image]]
        context = torch.zeros(32)
        for query in asked[image]:
            weights = torch.stack([query @ key / math.sqrt(32) for key in keys]).exp()
            context += sum(w * x for w, x in zip(weights / weights.sum(), features[image], strict=True)) / 5
        assert worst(got[image, 0], ours.value.weight @ context + ours.value.bias) < 1e-5


@pytest.mark.parametrize(("content", "hw"), [(1, (4, 4)), (2, (4, 4)), (2, (4, 6)), (4, (4, 4)), (None, (4, 6))])
@torch.no_grad()
def test_content_tokens_are_the_mean_of_each_block(content: int | None, hw: tuple[int, int]) -> None:
    ours = connector(content=content)
    seen = visual(hw=hw)
    tokens = ours(seen, IDS)
    down, across = (content, content) if content else hw
    assert tokens.shape[1] == ours.tokens_per_image(hw) == 1 + down * across
    first, last = ours.project[0], ours.project[2]
    height, width = hw[0] // down, hw[1] // across
    for place in range(down * across):
        row, column = divmod(place, across)
        block = [
            seen.grids[0][:, r * hw[1] + c]
            for r in range(row * height, (row + 1) * height)
            for c in range(column * width, (column + 1) * width)
        ]
        mean = torch.stack(block).mean(0)
        want = F.gelu(mean @ first.weight.T + first.bias) @ last.weight.T + last.bias
        assert worst(tokens[:, 1 + place], want) < 1e-5


@torch.no_grad()
def test_only_the_context_token_knows_the_question() -> None:
    ours = connector(content=2)
    tokens, other = ours(visual(), IDS), ours(visual(), IDS.flip(0))
    assert torch.equal(tokens[:, 1:], other[:, 1:]) and worst(tokens[:, 0], other[:, 0]) > 1e-4


def test_two_tokens_and_a_grid_that_does_not_divide() -> None:
    assert connector().tokens_per_image((27, 27)) == 2
    with pytest.raises(UserError, match=r"connector\.content=4"):
        connector(content=4).tokens_per_image((6, 4))
    with pytest.raises(UserError, match=r"connector\.content=0"):
        connector(content=0)

"""Queries first, then patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst

from vlmlab.connector.bliva import BlivaConnector
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import UserError

IDS = torch.tensor([[7, 8, -1], [9, 8, 7], [-1, -1, -1]])
SIZES = {"queries": 5, "hidden": 16, "layers": 2, "heads": 2, "vocab_size": 20, "max_words": 8}


@pytest.mark.parametrize("instruction", [True, False])
@torch.no_grad()
def test_bliva_is_the_q_former_and_one_layer_per_patch(instruction: bool) -> None:
    ours = spread(BlivaConnector(32, 24, instruction=instruction, **SIZES))
    qformer = QFormerConnector(32, 24, instruction=instruction, **SIZES).eval()
    missing, unexpected = qformer.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and unexpected == ["patches.weight", "patches.bias"]
    seen = visual()
    tokens = ours(seen, IDS)
    assert tokens.shape == (3, 5 + 16, 24) and ours.tokens_per_image((4, 4)) == 21
    assert torch.equal(tokens[:, :5], qformer(seen, IDS))
    for image in range(3):
        for place in range(16):
            want = ours.patches.weight @ seen.grids[0][image, place] + ours.patches.bias
            assert worst(tokens[image, 5 + place], want) < 1e-5


@torch.no_grad()
def test_patches_do_not_know_the_question() -> None:
    ours = spread(BlivaConnector(32, 24, **SIZES))
    tokens, other = ours(visual(), IDS), ours(visual(), IDS.flip(0))
    assert torch.equal(tokens[:, 5:], other[:, 5:]) and worst(tokens[:, :5], other[:, :5]) > 1e-3


@torch.no_grad()
def test_each_branch_may_read_a_layer_of_its_own() -> None:
    ours = spread(BlivaConnector(64, 24, own_layers=True, **SIZES))
    seen = visual(layers=2)
    tokens = ours(seen, IDS)
    alone = spread(BlivaConnector(32, 24, **SIZES))
    alone.load_state_dict(ours.state_dict())
    patches, queries = (replace(seen, grids=[grid]) for grid in seen.grids)
    assert torch.equal(tokens[:, :5], alone(queries, IDS)[:, :5])
    assert torch.equal(tokens[:, 5:], alone(patches, IDS)[:, 5:])
    for layers in (1, 3):
        with pytest.raises(UserError, match=r"set encoder.layers=\[-2,-1\]"):
            ours(visual(layers=layers), IDS)
    with pytest.raises(UserError, match="own_layers"):
        BlivaConnector(33, 24, own_layers=True, **SIZES)

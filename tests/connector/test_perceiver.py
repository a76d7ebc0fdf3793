"""One block of Flamingo's resampler as a plain loop, and what it promises about order and size."""

from __future__ import annotations

import math

import pytest
import torch
from tests.connector.features import visual
from tests.tiny import spread, worst
from torch import Tensor, nn
from torch.nn import functional as F

from vlmlab.connector.idefics2 import Idefics2Connector
from vlmlab.connector.perceiver import PerceiverConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Connector
from vlmlab.contracts.tensors import Visual


def perceiver(depth: int = 2) -> PerceiverConnector:
    return spread(PerceiverConnector(32, 24, latents=5, depth=depth, heads=2, head_dim=8))


def idefics2() -> Idefics2Connector:
    return spread(Idefics2Connector(32, 24, latents=5, depth=2, heads=4, head_dim=8, kv_heads=2))


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


@torch.no_grad()
def test_one_block_by_a_plain_loop() -> None:
    """q = LN(latents), k and v = [LN(features), LN(latents)]; both residuals; the last LayerNorm; the way out."""
    connector = perceiver(depth=1)
    attention, mlp = connector.resampler.blocks[0]
    latents, features = connector.resampler.latents, visual().grids[0][0]
    rows = [*norm(attention.context_layer_norm, features), *norm(attention.latents_layer_norm, latents)]
    found = []
    for latent in latents:
        query = attention.q_proj.weight @ norm(attention.latents_layer_norm, latent)
        heads = []
        for head in range(2):
            mine = slice(head * 8, head * 8 + 8)
            scores = [query[mine] @ (attention.k_proj.weight @ row)[mine] / math.sqrt(8) for row in rows]
            weights = torch.stack(scores).exp()
            values = [(attention.v_proj.weight @ row)[mine] for row in rows]
            heads.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
        after = latent + attention.output_proj.weight @ torch.cat(heads)
        after = after + mlp.c_proj.weight @ (mlp.fc.weight @ norm(mlp.ln, after)).clamp(min=0)
        found.append(connector.out(norm(connector.resampler.layer_norm, after)))
    assert worst(connector(visual())[0], torch.stack(found)) < 1e-5


@pytest.mark.parametrize("connector", [perceiver(), idefics2()], ids=["perceiver", "idefics2"])
@torch.no_grad()
def test_order_does_not_matter_and_every_size_gives_as_many(connector: Connector) -> None:
    seen = visual()
    shuffled = Visual([seen.grids[0][:, torch.randperm(16)]], None, seen.hw)
    assert worst(connector(seen), connector(shuffled)) < 1e-5
    for hw in ((1, 1), (3, 7)):
        assert connector(visual(hw=hw)).shape == (3, connector.tokens_per_image(hw), 24) == (3, 5, 24)


def test_latents_start_different() -> None:
    """Equal latents would get equal gradients and stay equal."""
    for made in (PerceiverConnector(32, 24), Idefics2Connector(32, 24, depth=1)):
        latents = made.resampler.latents.detach()
        assert 0.9 < float(latents.std()) < 1.1 and float(latents.std(0).min()) > 0.5


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"connector\.latents=0 is not possible"):
        PerceiverConnector(32, 24, latents=0)
    with pytest.raises(UserError, match=r"connector\.kv_heads=3 does not divide connector\.heads=4"):
        Idefics2Connector(32, 24, heads=4, kv_heads=3)

"""Gated cross-attention by loops, its size, and its keys; transformers' IDEFICS layer is in ``tests/parity``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ADJACENT, ONE_TURN, TEXT_ONLY, TWO_IMAGES, collator
from torch import nn

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.base import places_2d
from vlmlab.fusion.gated_xattn import CrossBlock, GatedCrossAttention
from vlmlab.mask.memory.latest import LatestImage
from vlmlab.model.vlm import VLM


def gated(**keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=GatedCrossAttention(LatestImage(), **{"heads": 2, "head_width": 6, "hidden": 2, **keys}))


@torch.no_grad()
def test_a_block_is_the_loop() -> None:
    model = gated(every=2)
    tiny.spread(model.fusion, seed=5, scale=0.3)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ADJACENT, ONE_TURN, TEXT_ONLY])
    seen, part = model.see(batch), model.fusion.blocks[1]
    assert isinstance(part, CrossBlock) and seen.tokens is not None
    media = seen.tokens + places_2d(4, 4, 32)
    states = torch.randn(*batch.input_ids.shape, 32, generator=torch.Generator().manual_seed(0))
    got = part(states, layout=batch.layout, memory=model.fusion.memories(seen, batch)["fusion.1"])
    images, layout, counted = batch.images, batch.layout, set()
    for t in range(0, got.shape[1], 2):
        before = [k for k in range(5)
                  if int(images.segment[k]) == int(layout.segment[0, t]) and int(images.place[k]) <= t]  # fmt: skip
        told = before[-1:]
        counted.add(len(before))
        y = states[0, t]
        heads = []
        for h in range(2):
            own = slice(6 * h, 6 * h + 6)
            q = part.attention.q.weight[own] @ part.attention_norm(y)
            tokens = [v for k in told for v in media[k]]
            scores = [float(q @ (part.attention.k.weight[own] @ v)) / math.sqrt(6) for v in tokens]
            weights = torch.tensor(scores).softmax(0) if scores else []
            values = [w * (part.attention.v.weight[own] @ v) for w, v in zip(weights, tokens, strict=True)]
            heads.append(torch.stack(values).sum(0) if values else torch.zeros(6))
        y = y + math.tanh(float(part.attention_gate)) * (part.attention.out.weight @ torch.cat(heads))
        inner = nn.functional.gelu(part.mlp.up.weight @ part.mlp_norm(y))
        want = y + math.tanh(float(part.mlp_gate)) * (part.mlp.down.weight @ inner)
        assert tiny.worst(got[0, t], want) < 1e-5, f"position {t} sees {told}"
    assert counted == {0, 1, 2}


def test_parameters_by_hand() -> None:
    """Per block: q and out 2 D H dh, k and v 2 Dt H dh, the feed-forward layer 2 D hidden, norms 4 D, two gates."""
    for every, blocks in ((1, 4), (2, 2), (3, 1)):
        parts = gated(every=every).fusion
        each = 4 * 32 * 12 + 2 * 32 * 64 + 4 * 32 + 2
        assert sum(p.numel() for p in parts.parameters()) == blocks * each
    wide = gated(every=4, mlp="swiglu", norm="rms", gate="vector", qk_norm=True).fusion
    assert sum(p.numel() for p in wide.parameters()) == 4 * 32 * 12 + 3 * 32 * 64 + 2 * 32 + 2 * 32 + 2 * 6


@torch.no_grad()
def test_a_text_gets_the_feed_forward_layer_alone() -> None:
    """Alone or packed beside a sample with an image, as in the released code."""
    model = gated()
    tiny.spread(model.fusion, seed=5)
    alone = model(collator(model)([TEXT_ONLY])).logits
    packed = model(collator(model, pack_length=1000)([ONE_TURN, TEXT_ONLY])).logits
    assert tiny.worst(packed[-len(alone) :], alone) < 1e-5
    for part in model.fusion.blocks:
        part.mlp_gate.zero_()
    assert tiny.worst(model(collator(model)([TEXT_ONLY])).logits, alone) > 1e-3


@torch.no_grad()
def test_places_tell_equal_tokens_apart() -> None:
    for positions in (True, False):
        model = gated(positions=positions)
        batch = collator(model)([ONE_TURN])
        seen = model.see(batch)
        assert seen.tokens is not None
        seen.tokens[:] = seen.tokens[:, :1]
        memory = model.fusion.memories(seen, batch)["fusion.0"].tensors
        for name in ("keys", "values"):
            assert (len(memory[name][0].unique(dim=0)) == 16) is positions


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.norm=batch is unknown; choose layer or rms"):
        gated(norm="batch")
    with pytest.raises(UserError, match=r"fusion.heads=3 does not divide the LM's width 32"):
        gated(heads=3, head_width=None)
    with pytest.raises(UserError, match=r"fusion.gate=none is unknown"):
        gated(gate="none")
    for key in ("heads", "head_width", "hidden"):
        with pytest.raises(UserError, match=rf"fusion.{key}=0 is not possible"):
            gated(**{key: 0})

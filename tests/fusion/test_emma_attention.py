"""EMMA's counterpart with attention, by a loop, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ONE_TURN, TEXT_ONLY, TWO_IMAGES, collator

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.emma_attention import InstructionAttention
from vlmlab.fusion.several import SeveralFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.vlm import VLM


def model_with(part: InstructionAttention) -> VLM:
    torch.manual_seed(0)
    encoder, lm = HfEncoder(str(tiny.two_towers()), layers=[1, -2]), HfLanguageModel(str(tiny.qwen2()))
    fusion = SeveralFusion({"mixing": part, "concat": ConcatFusion()})
    connector = tiny.spread(MlpConnector(encoder.width, lm.width), seed=1)
    return VLM(encoder, connector, fusion, lm, Bidirectional(), encoder.text_tower()).eval()


def softmax(scores: list[float]) -> list[float]:
    shares = [math.exp(score - max(scores)) for score in scores]
    return [share / sum(shares) for share in shares]


@torch.no_grad()
def test_it_is_the_loop() -> None:
    part = InstructionAttention(heads=2, inner=6)
    model = model_with(part)
    tiny.spread(part, seed=2)
    batch = collator(model)([ONE_TURN, TWO_IMAGES, TEXT_ONLY])
    assert model.encoder is not None and model.text is not None and batch.text_ids is not None
    visual, text = model.encoder(batch.pixels), model.text(batch.text_ids)  # (3, 16, 32) twice, (3, 12, 24)
    got = torch.cat(part.features(visual, batch, text).grids, -1)
    x = torch.cat(visual.grids, -1)
    assert batch.text_ids.lt(0).any(), "an instruction has padding after it"
    for i in range(3):
        rows = [part.norm(x[i, n]) for n in range(16)]
        kept = int(batch.text_ids[i].ge(0).sum())
        rows += [torch.nn.functional.gelu(part.project(text[i, t])) for t in range(kept)]
        for n in (0, 15):
            found: list[Any] = []
            for h in (slice(0, 3), slice(3, 6)):
                q = part.q(rows[n])[h]
                shares = softmax([float(q @ part.k(row)[h]) / math.sqrt(3) for row in rows])
                found += [sum(share * part.v(row)[h] for share, row in zip(shares, rows, strict=True))]
            assert torch.allclose(got[i, n], x[i, n] + part.o(torch.cat(found)), atol=1e-5)


@torch.no_grad()
def test_it_starts_as_the_features_and_has_the_stated_size() -> None:
    part = InstructionAttention(heads=4)
    model = model_with(part)
    batch = collator(model)([ONE_TURN])
    assert model.encoder is not None
    features, seen = model.encoder(batch.pixels), model.see(batch).visual
    assert seen is not None and all(torch.equal(a, b) for a, b in zip(seen.grids, features.grids, strict=True))
    dv, dt, c = 64, 24, 64
    assert sum(p.numel() for p in part.parameters()) == 2 * dv + dt * dv + dv + 4 * dv * c + 2 * c + dv


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="text tower and this encoder has none"):
        tiny.vlm(fusion=InstructionAttention())
    with pytest.raises(UserError, match="64 channels cannot be shared among"):
        model_with(InstructionAttention(heads=5))

"""Duplex attention by loops: the aligner in both directions, both ways of fusing, and every kind of pseudo-score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ONE_TURN, TWO_IMAGES, TWO_TURNS, collator
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.base import beside
from vlmlab.fusion.moda import DuplexAttention, DuplexBlock
from vlmlab.model.vlm import VLM

SCALE = 0.3


def duplex(**keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=DuplexAttention(**keys))


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with grouped keys, (B, Q, H, dh)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    ("fuse", "pseudo"),
    [("concat", "none"), ("add", "score"), (None, "score"), ("concat", "fixed"), ("add", "learnable")],
)
@torch.no_grad()
def test_a_block_is_the_loop(fuse: str | None, pseudo: str) -> None:
    block = tiny.spread(DuplexBlock(4, 8, fuse, pseudo, None, 90), seed=4, scale=0.4)
    model = tiny.vlm()
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ONE_TURN])
    visual, size = batch.layout.visual[0], batch.input_ids.shape[1]
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, size, 8, generator=make) for n in (4, 2, 2))
    allowed = model.mask(batch.layout, torch.arange(size))[:, None]
    given: dict[str, Any] = {"scale": SCALE, "layout": batch.layout, "keys": batch.layout, "memory": beside(batch)}
    got = block(plain, query, key, value, allowed, **given)
    assert {bool(v) for v in visual[::5]} == {True, False} and size > 90 > int(batch.layout.position[0, 40])
    for i in range(0, size, 5):
        sees = [j for j in range(size) if allowed[0, 0, i, j]]
        mine = int(visual[i])
        for h in range(4):
            q, k, v = query[0, h, i], key[0, h // 2], value[0, h // 2]
            own = torch.stack([k[j] for j in sees if int(visual[j]) == mine])
            gram = own.T @ own
            gram = gram / (gram.trace() / 8)
            scores = []
            for j in sees:
                fused = k[j]
                if int(visual[j]) != mine and fuse == "concat":
                    w = torch.cat([torch.eye(8), torch.zeros(8, 8)], 1) + block.change[mine]
                    fused = w @ torch.cat([k[j], gram @ k[j]])
                elif int(visual[j]) != mine and fuse == "add":
                    fused = k[j] + block.rho[mine, h] * gram @ k[j]
                scores.append(float(SCALE * q @ fused))
            ahead = max(0, 90 - 1 - int(batch.layout.position[0, i])) if pseudo != "none" else 0
            base = {"fixed": 0.0, "learnable": float(block.score[h]) if pseudo == "learnable" else 0.0}.get(pseudo, 0.0)
            slope = 2.0 ** (-8 * (h + 1) / 4) if pseudo == "score" else 0.0
            behind = [base - (j - 1) * slope for j in range(1, ahead + 1)]
            total = sum(math.exp(s) for s in scores + behind)
            want = sum(math.exp(s) / total * v[j] for s, j in zip(scores, sees, strict=True))
            assert tiny.worst(got[0, i, h], want) < 1e-5, (i, h)


@pytest.mark.parametrize(
    "keys", [{"fuse": "add"}, {"pseudo": "score", "length": 400}, {"aligner": False, "pseudo": "learnable"}]
)
def test_other_choices_pack_learn_and_decode(keys: dict[str, Any]) -> None:
    """The shared tests hold the shipped choice."""
    model = duplex(**keys)
    tiny.spread(model.fusion, seed=5, scale=0.3)
    make = collator(model)
    asked = (ONE_TURN, TWO_TURNS, TWO_IMAGES)
    with torch.no_grad():
        alone = torch.cat([model(make([sample])).logits for sample in asked])
        assert tiny.worst(model(collator(model, pack_length=1000)(asked)).logits, alone) < 2e-5
        batch = make.ask(asked)
        seen = model.see(batch)
        inside = model.inside(batch, seen)
        ids = model.lm.generate(model.embed(batch, seen), batch.layout, model.mask, 4, inside, eos_token_id=-1)
        for step in range(4):
            length = batch.input_ids.shape[1] + step
            embeds = torch.cat([model.embed(batch, seen), model.lm.embed(ids[:, :step])], 1)
            every = inside.at(torch.arange(length))
            states = model.lm.states(embeds, batch.layout.extended(length), model.mask, every)
            assert model.lm.logits(states[:, -1]).argmax(-1).tolist() == ids[:, step].tolist()
    outputs = model(make(asked))
    torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.fusion.parameters())


def test_parameters_by_hand() -> None:
    for keys, each in (({}, 4 * 8**2), ({"fuse": "add"}, 8), ({"aligner": False, "pseudo": "learnable"}, 4)):
        assert sum(p.numel() for p in duplex(**keys).fusion.parameters()) == 4 * each  # type: ignore[arg-type]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.aligner=false and fusion.pseudo=none leave concat"):
        duplex(aligner=False)
    with pytest.raises(UserError, match=r"fusion.pseudo=inf is unknown; choose none or fixed or score or learnable"):
        duplex(pseudo="inf")
    with pytest.raises(UserError, match=r"fusion.length=0 is not possible"):
        duplex(length=0)

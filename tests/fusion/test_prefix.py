"""Image-made keys and values by loops, in one softmax and in one of their own; their size and their keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ADJACENT, ONE_TURN, TEXT_ONLY, TWO_IMAGES, collator
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.base import places_2d
from vlmlab.fusion.prefix import ImagePrefix, PrefixBlock
from vlmlab.mask.memory.before import ImagesBefore
from vlmlab.model.vlm import VLM


def prefixed(**keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=ImagePrefix(ImagesBefore(), **keys))


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with grouped keys, (B, Q, H, dh)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(
        1, 2
    )


@pytest.mark.parametrize("gate", ["zero", "none"])
@pytest.mark.parametrize("hidden", [None, 6])
@torch.no_grad()
def test_a_block_is_the_loop(gate: str, hidden: int | None) -> None:
    model = prefixed(gate=gate, hidden=hidden)
    tiny.spread(model.fusion, seed=5, scale=0.3)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ADJACENT, ONE_TURN, TEXT_ONLY])
    seen, block = model.see(batch), model.fusion.blocks[1]
    assert isinstance(block, PrefixBlock) and seen.tokens is not None
    tokens = seen.tokens + places_2d(4, 4, 32)
    if hidden:
        tokens = torch.tanh(tokens @ model.fusion.enter.weight.T + model.fusion.enter.bias)
    make, size = torch.Generator().manual_seed(0), batch.input_ids.shape[1]
    query, key, value = (torch.randn(1, n, size, 8, generator=make) for n in (4, 2, 2))
    mask = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
    memory = model.fusion.memories(seen, batch)["fusion.1"]
    given: dict[str, Any] = {"scale": 0.3, "layout": batch.layout, "keys": batch.layout, "memory": memory}
    got = block(plain, query, key, value, mask, **given)
    assert tiny.worst(got, block(plain, query, key, value, None if gate == "none" else mask, **given)) < 1e-6
    counted = set()
    for t in range(0, size, 2):
        told = [k for k in range(5) if int(batch.images.segment[k]) == int(batch.layout.segment[0, t])
                and int(batch.images.place[k]) <= t]  # fmt: skip
        counted.add(len(told))
        for h in range(4):
            own = slice(8 * (h // 2), 8 * (h // 2) + 8)
            each = [v for k in told for v in tokens[k]]
            keys = [block.k.weight[own] @ v + block.k.bias[own] for v in each]
            values = [block.v.weight[own] @ v + block.v.bias[own] for v in each]
            text = [*zip(key[0, h // 2, : t + 1], value[0, h // 2, : t + 1], strict=True)]
            images = [*zip(keys, values, strict=True)]
            parts = [(text, 1.0), (images, float(block.gate[h].tanh()))] if gate == "zero" else [(images + text, 1.0)]
            want = torch.zeros(8)
            for pairs, factor in parts:
                if pairs:
                    weights = torch.stack([0.3 * query[0, h, t] @ k for k, _ in pairs]).softmax(0)
                    want += factor * sum(w * v for w, (_, v) in zip(weights, pairs, strict=True))
            assert tiny.worst(got[0, t, h], want) < 1e-5, f"position {t} sees {told}"
    assert counted == {0, 1, 2}


@torch.no_grad()
def test_one_softmax_decodes_with_a_cache() -> None:
    """``gate=none`` as a whole; the shared tests hold the shipped choice."""
    model = prefixed(gate="none")
    tiny.spread(model.fusion, seed=5)
    make = collator(model)
    alone = torch.cat([model(make([sample])).logits for sample in (ONE_TURN, TWO_IMAGES, TEXT_ONLY)])
    packed = collator(model, pack_length=1000)([ONE_TURN, TWO_IMAGES, TEXT_ONLY])
    assert tiny.worst(model(packed).logits, alone) < 2e-5
    batch = make.ask([ONE_TURN, TWO_IMAGES, TEXT_ONLY])
    seen = model.see(batch)
    inside = model.inside(batch, seen)
    ids = model.lm.generate(model.embed(batch, seen), batch.layout, model.mask, 5, inside, eos_token_id=-1)
    for step in range(5):
        length = batch.input_ids.shape[1] + step
        every = inside.at(torch.arange(length))
        embeds = model.lm.embed(torch.cat([batch.input_ids, ids[:, :step]], 1))
        states = model.lm.states(embeds, batch.layout.extended(length), model.mask, every)
        assert model.lm.logits(states[:, -1]).argmax(-1).tolist() == ids[:, step].tolist()
    assert model.fusion.starts_as == "nothing"


def test_parameters_by_hand() -> None:
    assert sum(p.numel() for p in prefixed().fusion.parameters()) == 4 * (2 * 33 * 16 + 4)
    own = prefixed(gate="none", hidden=6, every=2).fusion
    assert sum(p.numel() for p in own.parameters()) == 33 * 6 + 2 * 2 * 7 * 16


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.gate=one is unknown; choose zero or none"):
        prefixed(gate="one")
    with pytest.raises(UserError, match=r"fusion.hidden=0 is not possible"):
        prefixed(hidden=0)
    with pytest.raises(UserError, match=r"fusion.layers=\[9\] names a layer that is not there"):
        prefixed(layers=[9])

"""Perceptual weights by loops, merged into the LM's own, their size, and their keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ADJACENT, ONE_TURN, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator
from transformers import Phi3Config, Phi3ForCausalLM

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Seen
from vlmlab.fusion.vlora import PerceptualWeights, WeightDelta
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.memory.before import ImagesBefore
from vlmlab.mask.memory.sample import ImagesOfSample
from vlmlab.model.vlm import VLM

SMALL: dict[str, Any] = {"rank": 3, "alpha": 6.0, "width": 12, "depth": 2, "heads": 2, "every": 2}


def vlora(sees: Any = None, lm: Any = None, **keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=PerceptualWeights(sees or ImagesOfSample(), **{**SMALL, **keys}), lm=lm)


@pytest.mark.parametrize("images", ["mean", "sum"])
@torch.no_grad()
def test_a_block_is_the_loop(images: str) -> None:
    model = vlora(ImagesBefore(), images=images)
    tiny.spread(model.fusion, seed=5)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ADJACENT, ONE_TURN, TEXT_ONLY])
    seen = model.see(batch)
    made = model.fusion.weights(seen)["k"]  # (I, K, Din, r)
    block = model.fusion.blocks["k"][1]
    assert isinstance(block, WeightDelta) and made.shape == (5, 2, 32, 3)
    make = torch.Generator().manual_seed(0)
    x, out = (torch.randn(*batch.input_ids.shape, width, generator=make) for width in (32, 16))
    got = block(x, out, layout=batch.layout, memory=model.fusion.memories(seen, batch)["fusion.k.1"])
    counted = set()
    for t in range(got.shape[1]):
        told = [k for k in range(5) if int(batch.images.segment[k]) == int(batch.layout.segment[0, t])
                and int(batch.images.place[k]) <= t]  # fmt: skip
        counted.add(len(told))
        want = out[0, t]
        for k in told:
            change = 6.0 / 3 * block.B @ made[k, 1].T  # (Dout, Din)
            want = want + change @ x[0, t] / (len(told) if images == "mean" else 1)
        assert tiny.worst(got[0, t], want) < 1e-5, f"position {t} sees {told}"
    assert counted == {0, 1, 2}


@torch.no_grad()
def test_a_generator_is_the_loop() -> None:
    """Queries through pre-norm layers, one image at a time and one head at a time."""
    generator = tiny.spread(vlora(types=["v"]).fusion.generators["v"], seed=3, scale=0.3)
    image = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    got = generator(image)

    def attention(part: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        heads = []
        for h in range(2):
            own = slice(6 * h, 6 * h + 6)
            q, k, v = x @ part.q.weight[own].T, y @ part.k.weight[own].T, y @ part.v.weight[own].T
            heads.append((q @ k.T / 6**0.5).softmax(-1) @ v)
        return torch.cat(heads, -1) @ part.out.weight.T

    for i in range(2):
        x = generator.queries
        for layer in generator.layers:
            y = layer.self_norm(x)
            x = x + attention(layer.self_attention, y, y)
            x = x + attention(layer.cross_attention, layer.cross_norm(x), image[i])
            x = x + layer.mlp(layer.mlp_norm(x))
        want = (generator.norm(x) @ generator.out.weight.T + generator.out.bias).reshape(2, 32, 3)
        assert tiny.worst(got[i], want) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@torch.no_grad()
def test_merged_weights_give_the_same(family: str) -> None:
    lm = HfLanguageModel(str(getattr(tiny, family)()))
    model = vlora(lm=lm)
    tiny.spread(model.fusion, seed=5)
    batch = collator(model)([TWO_TURNS])
    seen = model.see(batch)
    merged = model.fusion.merged(lm.model, seen)
    want = model.lm.logits(model(batch).states)
    mask = batch.layout.valid.long()
    got = merged(input_ids=batch.input_ids, attention_mask=mask).logits
    plain = lm.model(input_ids=batch.input_ids, attention_mask=mask).logits
    assert tiny.worst(got, want) < 1e-4 < 1e-2 < tiny.worst(plain, want)
    with pytest.raises(ValueError, match="one image"):
        model.fusion.merged(lm.model, Seen())


def test_parameters_by_hand() -> None:
    """As the class says; a single layer has a single query, which has no self-attention."""
    g, tokens, width = 12, 16, 32
    kv, hidden = 16, 32
    for every, count in ((1, 4), (2, 2), (4, 1)):
        fusion = vlora(every=every).fusion
        layer = 16 * g**2 + 11 * g if count > 1 else 12 * g**2 + 9 * g
        each = count * g + 2 * layer + 2 * g + (g + 1) * width * 3
        outs = {"q": width, "k": kv, "v": kv, "o": width, "m": hidden}
        want = width * g + g + tokens * g + sum(each + count * out * 3 for out in outs.values())
        assert sum(p.numel() for p in fusion.parameters()) == want


def test_a_single_layer_learns_whole() -> None:
    model = vlora(every=4)
    tiny.spread(model.fusion, seed=1)
    outputs = model(collator(model)([ONE_TURN]))
    torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.fusion.parameters())


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"fusion.types=x is unknown; choose q or k or v or o or m"):
        vlora(types=["x", "q"])
    with pytest.raises(UserError, match=r"fusion.images=max is unknown"):
        vlora(images="max")
    with pytest.raises(UserError, match=r"fusion.heads=5 does not divide fusion.width=12"):
        vlora(heads=5)
    with pytest.raises(UserError, match=r"fusion.rank=0 is not possible"):
        vlora(rank=0)
    joined = Phi3ForCausalLM(Phi3Config(**tiny.text_config(sliding_window=None)))
    folder = str(tiny.save_lm(joined, "phi3"))
    with pytest.raises(UserError, match=r"fusion.types has q, .* no such map of their own .*; choose from o and m"):
        vlora(lm=HfLanguageModel(folder))
    model = vlora(lm=HfLanguageModel(folder), types=["o", "m"])
    assert model(collator(model)([ONE_TURN])).logits.isfinite().all()

"""LaVi's deltas by loops over positions, images and heads; its parameters by hand; what its keys do."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.tiny import ADJACENT, ONE_TURN, TEXT_ONLY, TWO_IMAGES, collator
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from vlmlab.connector.none import NoConnector
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Memory
from vlmlab.encoder.hf import HfEncoder
from vlmlab.fusion.base import places_2d
from vlmlab.fusion.lavi import InfusedNorm, LaViFusion
from vlmlab.mask.memory.before import ImagesBefore
from vlmlab.model.vlm import VLM


def lavi(connector: nn.Module | None = None, **keys: Any) -> VLM:
    torch.manual_seed(0)
    return tiny.vlm(fusion=LaViFusion(ImagesBefore(), **{"every": 2, "width": 12, **keys}), connector=connector)


def block(model: VLM, index: int) -> InfusedNorm:
    found = model.fusion.norms[index]
    assert isinstance(found, InfusedNorm)
    return found


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def linear(part: nn.Linear, x: Tensor) -> Tensor:
    """One vector through a linear map, channel by channel."""
    bias = torch.zeros(part.out_features) if part.bias is None else part.bias
    return torch.stack([(part.weight[c] * x).sum() + bias[c] for c in range(part.out_features)])


def normal(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def attended(inner: Any, x: Tensor, visual: list[Tensor], heads: int) -> Tensor:
    """Multi-head attention of one vector over the tokens of all images it sees, head by head."""
    q, width = linear(inner.q, x), len(x) // heads
    out = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        scores = [float((q[own] * linear(inner.k, v)[own]).sum()) / math.sqrt(width) for v in visual]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        values = [w / sum(weights) * linear(inner.v, v)[own] for w, v in zip(weights, visual, strict=True)]
        out.append(torch.stack(values).sum(0))
    return x + linear(inner.out, torch.cat(out))


def mixer(inner: Any, visual: Tensor) -> Tensor:
    """(M, c) -> (c,)."""
    normed = torch.stack([normal(v) for v in visual])
    columns = [inner.along_tokens(normed[:, c]) for c in range(visual.shape[1])]
    visual = visual + torch.stack(columns, 1)
    return torch.stack([v + inner.along_channels(normal(v)) for v in visual]).mean(0)


def convolved(inner: Any, visual: Tensor) -> Tensor:
    """(16, c) in a grid of 4 x 4 -> (c,); windows of 3 x 3, zeros outside."""
    x = visual.reshape(4, 4, -1)
    gelu = nn.GELU()
    for deep, point in zip(inner.depthwise, inner.pointwise, strict=True):
        out = torch.zeros_like(x)
        for r in range(4):
            for c in range(4):
                total = deep.bias.clone()
                for i in range(3):
                    for j in range(3):
                        if 0 <= r + i - 1 < 4 and 0 <= c + j - 1 < 4:
                            total += deep.weight[:, 0, i, j] * x[r + i - 1, c + j - 1]
                out[r, c] = normal(gelu(total) + x[r, c])
        x = torch.stack(
            [torch.stack([normal(gelu(point.weight[:, :, 0, 0] @ v + point.bias)) for v in row]) for row in out]
        )
    return x.mean((0, 1))


@pytest.mark.parametrize("conditioner", ["attention", "mlp", "conv"])
@torch.no_grad()
def test_the_deltas_are_the_loop(conditioner: str) -> None:
    model = lavi(conditioner=conditioner, heads=3, kernel=3, hidden=7)
    tiny.spread(model.fusion, seed=5, scale=0.3)
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ONE_TURN, TEXT_ONLY])
    seen, fusion, part = model.see(batch), model.fusion, block(model, 1)
    assert seen.tokens is not None
    visual = [
        torch.stack(
            [linear(fusion.project, normal(v)) + place for v, place in zip(tokens, places_2d(4, 4, 12), strict=True)]
        )
        for tokens in seen.tokens
    ]
    memory: Memory = fusion.memories(seen, batch)["fusion.1"]
    generator = torch.Generator().manual_seed(0)
    states, normed, out = torch.randn(3, *batch.input_ids.shape, 32, generator=generator)
    got = part(states, normed, out, layout=batch.layout, memory=memory)
    images, layout = batch.images, batch.layout
    for t in range(0, got.shape[1], 3):
        told = [
            k for k in range(3)
            if int(images.segment[k]) == int(layout.segment[0, t]) and int(images.place[k]) <= t
        ]  # fmt: skip
        want = out[0, t]
        if told:
            x = linear(part.enter, normed[0, t])
            if conditioner == "attention":
                u = attended(part.inner, x, [v for k in told for v in visual[k]], 3)
            else:
                one = mixer if conditioner == "mlp" else convolved
                v = torch.stack([one(part.inner, visual[k]) for k in told]).mean(0)
                u = linear(part.inner.by_text, x) * linear(part.inner.by_image, v)
            delta = linear(part.head, silu(u))
            want = out[0, t] + delta[:32] * normed[0, t] + delta[32:]
        assert tiny.worst(got[0, t], want) < 1e-5, f"position {t} sees {told}"


def test_parameters_by_hand() -> None:
    """The method's count for an LM of 896 channels and features of 1,152: 2,009,280 a norm, 516,544 once."""
    config = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=32)  # fmt: skip
    with torch.device("meta"):
        lm = SimpleNamespace(model=Qwen2ForCausalLM(config), width=896)
        model: Any = SimpleNamespace(
            lm=lm, token_width=1152, connector=NoConnector(1152, 896), encoder=SimpleNamespace(hw=(27, 27))
        )
        fusion = LaViFusion(ImagesBefore(), every=4)
        fusion.attach(model)
    norms = [sum(p.numel() for p in part.parameters()) for part in fusion.norms]
    assert norms == [2_009_280] * 12 and sum(p.numel() for p in fusion.parameters()) == 12 * 2_009_280 + 516_544
    half = LaViFusion(ImagesBefore(), every=4, shift=False)
    with torch.device("meta"):
        half.attach(model)
    assert sum(p.numel() for p in half.norms[0].parameters()) == 2_009_280 - (448 * 896 + 896)


@pytest.mark.parametrize(
    ("keys", "norms"),
    [({"every": 1}, 8), ({"every": 2}, 4), ({"every": 4}, 2), ({"layers": [0, -1]}, 4), ({"sublayers": "mlp"}, 2),
     ({"every": 1, "sublayers": "attention"}, 4)],
)  # fmt: skip
def test_which_norms(keys: dict[str, Any], norms: int) -> None:
    assert len(lavi(**keys).fusion.norms) == norms


@torch.no_grad()
def test_scale_or_shift_alone() -> None:
    for keys, wide in (({"scale": False}, 32), ({"shift": False}, 32), ({}, 64)):
        model = lavi(**keys)
        tiny.spread(model.fusion, seed=5)
        assert block(model, 0).head.out_features == wide
        batch = collator(model)([ONE_TURN])
        memory = model.fusion.memories(model.see(batch), batch)["fusion.0"]
        zero = torch.zeros(*batch.input_ids.shape, 32)
        moved = block(model, 0)(zero, zero, zero, layout=batch.layout, memory=memory)
        assert bool(moved.any()) == ("scale" in keys or not keys), "a scale moves nothing where nothing is"


@torch.no_grad()
def test_places_tell_equal_tokens_apart() -> None:
    for positions in (True, False):
        model = lavi(positions=positions, connector=tiny.spread(tiny.MlpConnector(32, 32), seed=1))
        batch = collator(model)([ONE_TURN])
        seen = model.see(batch)
        assert seen.tokens is not None
        seen.tokens[:] = seen.tokens[:, :1]
        keys = model.fusion.memories(seen, batch)["fusion.0"].tensors["keys"]
        assert (len(keys[0].unique(dim=0)) == 16) is positions


def test_what_cannot_be_is_said() -> None:
    reader = QFormerConnector(32, 32, queries=4, layers=1, heads=2)
    with pytest.raises(UserError, match=r"positions=true needs visual tokens that form a grid"):
        lavi(connector=reader, positions=True)
    lavi(connector=reader)  # auto
    with pytest.raises(UserError, match=r"conditioner=conv needs visual tokens that form a grid"):
        lavi(connector=reader, conditioner="conv")
    with pytest.raises(UserError, match=r"fusion.heads=5 does not divide fusion.width=12"):
        lavi(heads=5)
    lavi(heads=5, conditioner="mlp")  # it has none
    for key in ("width", "heads", "hidden", "kernel"):
        with pytest.raises(UserError, match=rf"fusion.{key}=0 is not possible"):
            lavi(**{key: 0})
    with pytest.raises(UserError, match=r"fusion.every=9 leaves no layer of 4"):
        lavi(every=9)
    with pytest.raises(UserError, match=r"fusion.layers=\[4\] names a layer that is not there"):
        lavi(layers=[4])
    with pytest.raises(UserError, match=r"fusion.conditioner=mix is unknown; choose attention or mlp or conv"):
        lavi(conditioner="mix")
    with pytest.raises(UserError, match=r"leave vision no way in"):
        lavi(scale=False, shift=False)


@torch.no_grad()
def test_features_without_a_connector() -> None:
    encoder = HfEncoder(str(tiny.siglip()), layers=[1, -2])
    torch.manual_seed(0)
    model = VLM(encoder, NoConnector(64, 32), LaViFusion(ImagesBefore()), tiny.vlm().lm, tiny.Bidirectional()).eval()
    assert model.token_width == 64 == model.fusion.project.in_features
    assert model(collator(model)([ONE_TURN, ADJACENT])).logits.isfinite().all()

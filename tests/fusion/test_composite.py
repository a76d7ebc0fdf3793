"""``composite`` is ``concat`` under ``visual_self_only``, and ``saisa`` its loop; neither computes visual queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fusion.test_fusions import FAMILIES, loss, questions
from tests.fusion.test_visual_expert import phi3
from tests.tiny import ADJACENT, ONE_TURN, SAMPLES, TEXT_ONLY, TWO_IMAGES, collator
from torch import nn

from vlmlab.contracts.errors import UserError
from vlmlab.fusion.composite import CompositeAttention
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.fusion.saisa import SaisaFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal
from vlmlab.mask.visual_self_only import VisualSelfOnly
from vlmlab.model.vlm import VLM

LMS: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: HfLanguageModel(str(make())) for name, make in FAMILIES.items()},
    "sliding_qwen2": lambda: HfLanguageModel(str(tiny.sliding_qwen2())),
    "phi3": phi3,
}


@pytest.mark.parametrize("name", LMS)
def test_composite_is_concat_with_images_that_see_themselves(name: str) -> None:
    """Logits, gradients and answers; whatever its mask says of images."""
    dense = tiny.vlm(mask=VisualSelfOnly(), fusion=ConcatFusion(), lm=LMS[name]())
    for mask in (VisualSelfOnly(), Bidirectional(), Causal()):
        ours = tiny.vlm(mask=mask, fusion=CompositeAttention(), lm=LMS[name]())
        for pack in (None, 1000):
            batch = collator(ours, pack_length=pack)(SAMPLES)
            got, want = ours(batch).logits, dense(batch).logits
            assert tiny.worst(got, want) <= 1e-6 * max(1.0, float(want.detach().abs().max()))
        asked = questions(ours)
        assert ours.generate(asked, 6) == dense.generate(asked, 6)
        assert ours.generate(asked, 4, num_beams=3) == dense.generate(asked, 4, num_beams=3)
    batch = collator(ours)(SAMPLES)
    for model in (ours, dense):
        loss(model, batch).backward()
    theirs = dict(dense.named_parameters())
    for key, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert tiny.worst(parameter.grad, theirs[key].grad) < 2e-6, key


@torch.no_grad()
@pytest.mark.parametrize("fusion", [CompositeAttention, SaisaFusion])
def test_what_is_skipped_is_not_computed(fusion: Callable[[], Any]) -> None:
    """Rows that go through the LM's own maps, and keys and queries of its attention."""
    model = tiny.vlm(fusion=fusion())
    batch = collator(model, pack_length=1000)([TWO_IMAGES, ONE_TURN, TEXT_ONLY])
    text, every = int((batch.layout.valid & ~batch.layout.visual).sum()), int(batch.layout.valid.sum())
    assert every - text == 48
    rows = counted(model)
    model(batch)
    through = {"q_proj": text, "k_proj": every, "v_proj": every}
    rest = ("o_proj", "gate_proj", "up_proj", "down_proj")
    assert rows == through | dict.fromkeys(rest, every if fusion is CompositeAttention else text)


def counted(model: VLM) -> dict[str, int]:
    """Rows that enter the linear maps of the second layer, filled by each forward pass."""
    found: dict[str, int] = {}
    real = nn.functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if (name := known.get(id(weight))) is not None:
            found[name] = x[..., 0].numel()
        return real(x, weight, bias)

    layer = model.lm.model.base_model.layers[1]
    known = {id(m.weight): n.rpartition(".")[2] for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    model.register_forward_pre_hook(lambda *_: setattr(nn.functional, "linear", linear))
    model.register_forward_hook(lambda *_: setattr(nn.functional, "linear", real), always_call=True)
    return found


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2])
def test_saisa_is_the_loop(every: int) -> None:
    """Layer by layer on one row: visual states are set, text attends to all before it and goes through the MLP."""
    model = tiny.vlm(mask=Causal(), fusion=SaisaFusion(every=every))
    tiny.spread(model.fusion, seed=6)
    batch = collator(model)([TWO_IMAGES])
    seen, lm, visual = model.see(batch), model.lm.model.base_model, batch.layout.visual[0]
    assert seen.tokens is not None and len(model.fusion.projections) == 4 // every
    x = model.lm.embed(batch.input_ids)[0]
    angles = lm.rotary_emb(x[None], batch.layout.position)
    for k, layer in enumerate(lm.layers):
        x = x.clone()
        x[visual] = model.fusion.projections[k // every](seen.tokens).flatten(0, 1)
        old = x
        dense = type(layer).forward(layer, x[None], position_embeddings=angles, attention_mask=None)[0]
        x = torch.where(visual[:, None], old, dense)  # every text row as a plain layer gives it
    assert tiny.worst(model(batch).states[0, ~visual], lm.norm(x)[~visual]) < 1e-5


@torch.no_grad()
def test_saisa_reads_tokens_of_any_width() -> None:
    from vlmlab.connector.none import NoConnector

    model = tiny.vlm(connector=NoConnector(32, 32), fusion=SaisaFusion(hidden=7))
    assert sum(p.numel() for p in model.fusion.parameters()) == 4 * (32 * 7 + 7 + 7 * 32 + 32)
    batch = collator(model)([ADJACENT])
    changed = model(replace(batch, pixels=batch.pixels.flip(0)))
    assert tiny.worst(changed.logits, model(batch).logits) > 1e-4


def test_saisa_wants_a_layer_for_each_projection() -> None:
    with pytest.raises(UserError, match=r"fusion.every=5 is too large; give a number from 1 to 4"):
        tiny.vlm(fusion=SaisaFusion(every=5))

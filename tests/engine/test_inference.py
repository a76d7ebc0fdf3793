"""What an answer costs, counted on a small model with its values and without them, against formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.plan.test_fusion_flops import Sizes, gated_block, lavi_norm, lavi_once
from tests.plan.test_plan import batch, entered
from tests.test_conf import composed

from vlmlab.contracts.errors import UserError
from vlmlab.engine.cost import answering, counted
from vlmlab.engine.inference import Reading, answer_cost, read
from vlmlab.plan.inference import InferenceCost, inference_costs
from vlmlab.plan.plan import Shape
from vlmlab.recipe.stage import parse

TEXT = 80
"""Of ``test_fusion_flops``, whose formulas count so many text tokens."""


def planned(tokens: int, *overrides: str, images: int = 1) -> InferenceCost:
    return inference_costs(composed(*overrides), [(images, tokens)])[0]


def really(*overrides: str) -> tuple[Any, Reading]:
    cfg = composed("collate.pack_length=null", *overrides)
    stage = parse(cfg)[3]
    staged = entered(cfg, stage, "cpu")
    model: Any = staged.model
    one = batch(cfg, stage, staged, Shape(1, TEXT, 0))
    with answering(model), counted() as counter:
        found = read(model, one, counter.get_total_flops)
    of_a_run = {"flops_token": found.token, "cache_bytes": found.kept, "added": model.added()}
    assert answer_cost(model, one) == of_a_run and model.training
    return model, found


@pytest.mark.parametrize(("fusion", "visual"), [("concat", 16), ("lavi", 0), ("gated_xattn", 0)])
def test_against_formulas(fusion: str, visual: int) -> None:
    model, found = really(f"fusion={fusion}")
    z, layers = Sizes.of(model), model.lm.model.config.num_hidden_layers
    text = model.lm.model.config
    prompt = visual + TEXT
    head = 2 * z.d * text.vocab_size
    lm = z.layer(prompt) * layers
    fusing = z.connector()
    if fusion == "lavi":
        blocks = lavi_norm(z, z.d // 2, "attention") * (2 * layers)
        once = lavi_once(z, z.d // 2)
        memory = 2 * layers * 2 * z.n * (z.d // 2)  # keys and values of every norm
        of_images = 2 * z.n * 2 * (z.d // 2) ** 2 * 2 * layers  # their maps, which are made before the layers
        fusing, lm = fusing + once, lm + blocks
    elif fusion == "gated_xattn":
        lm = lm + gated_block(z, z.d, "gelu") * layers
        memory = layers * 2 * z.n * z.d
        of_images = 2 * z.n * 2 * z.d * z.d * layers
    else:
        memory, of_images = 0, 0
    assert found.prompt == prompt
    assert found.vision == pytest.approx(z.encoder().forward, rel=0.01)
    assert found.fusing == pytest.approx(fusing.forward + of_images, rel=0.01)
    assert found.prefill == pytest.approx(lm.forward - of_images + head, rel=0.01)
    keys = 2 * layers * prompt * text.num_key_value_heads * (z.d // text.num_attention_heads)
    assert (found.cache, found.memory) == (4 * keys, 4 * memory)
    if fusion == "concat":
        one = z.layer(1).forward - 4 * z.d + 4 * (prompt + 1) * z.d  # its query looks at all that is cached
        assert found.token == pytest.approx(layers * one + head, rel=0.01)


def test_the_next_token_is_the_one_of_a_full_pass() -> None:
    """What is counted is the model's own decoding: the cache gives the states that a longer prompt has."""
    cfg = composed("collate.pack_length=null", "fusion=gated_xattn")
    stage = parse(cfg)[3]
    staged = entered(cfg, stage, "cpu")
    model: Any = staged.model.eval()
    for block in model.fusion.blocks:
        torch.nn.init.constant_(block.attention_gate, 0.5)
    whole = batch(cfg, stage, staged, Shape(1, 12, 1))
    with torch.no_grad():
        seen = model.see(whole)
        embeds, inside = model.embed(whole, seen), model.inside(whole, seen)
        full = model.lm.states(embeds, whole.layout, model.mask, inside)
        length = embeds.shape[1]
        first, last = torch.arange(length - 1), torch.arange(length - 1, length)
        cache = model.lm.prefill(embeds[:, :-1], whole.layout.at(first), model.mask, inside.at(first))
        step = model.lm.states(embeds[:, -1:], whole.layout, model.mask, inside.at(last), cache)
    assert torch.allclose(step[:, 0], full[:, -1], atol=1e-5)


@pytest.mark.parametrize("fusion", ["concat", "lavi"])
def test_without_weights_the_counts_are_the_same(fusion: str) -> None:
    model, found = really(f"fusion={fusion}", "precision=fp32")
    cost = planned(TEXT, f"fusion={fusion}", "precision=fp32")
    assert cost.reading == found
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.added == sum(p.numel() for part in (model.connector, model.fusion) for p in part.parameters())


def test_adapters_are_added_weights() -> None:
    plain, adapted = (planned(8, *more) for more in ((), ("adapter=lora",)))
    assert 0 < adapted.added - plain.added == adapted.params - plain.params


def test_a_prompt_is_bounded() -> None:
    with pytest.raises(UserError, match="images=0 and tokens=32769 make a prompt of 32,769; at most 32,768"):
        planned(32_769, "fusion=none", images=0)


def test_half_precision_keeps_half_the_bytes() -> None:
    whole, half = (planned(8, f"precision={name}") for name in ("fp32", "bf16"))
    assert whole.reading.cache == 2 * half.reading.cache and whole.weights == 2 * half.weights
    assert whole.reading.first == half.reading.first

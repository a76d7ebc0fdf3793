"""What ``cost.json`` says of one sample: positions of an image in the sequence, and FLOPs with the fusion's blocks."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plan.test_fusion_flops import ANSWERED, ASKED, TEXT, Sizes, emma, gated_block, lavi_norm, lavi_once, skipping
from tests.plan.test_plan import batch, entered
from tests.test_conf import composed

from vlmlab.engine.cost import sample_cost
from vlmlab.plan.plan import Shape
from vlmlab.recipe.stage import parse


@pytest.mark.parametrize(
    ("fusion", "visual"), [("concat", 16), ("lavi", 0), ("gated_xattn", 0), ("emma", 16), ("composite", 16)]
)
def test_a_sample_of_every_fusion(fusion: str, visual: int) -> None:
    cfg = composed(f"fusion={fusion}")
    stage = parse(cfg)[3]
    staged = entered(cfg, stage, "cpu")
    model: Any = staged.model
    model.train()
    found = sample_cost(model, batch(cfg, stage, staged, Shape(1, ASKED, ANSWERED)))
    assert found["visual_tokens"] == visual and model.training

    layers, z = model.lm.model.config.num_hidden_layers, Sizes.of(model)
    wanted = z.encoder() + z.connector() + z.layer(visual + TEXT) * layers + z.head()
    if fusion == "lavi":
        wanted += lavi_once(z, z.d // 2) + lavi_norm(z, z.d // 2, "attention") * (2 * layers)
    elif fusion == "gated_xattn":
        wanted += gated_block(z, z.d, "gelu") * layers
    elif fusion == "composite":
        wanted = z.encoder() + z.connector() + skipping(z, visual + TEXT) * layers + z.head()
    elif fusion == "emma":
        read, mixed = emma(z, model.text)
        wanted += read + mixed
    assert found["flops_sample"] == pytest.approx(wanted.forward, rel=0.01)


def test_a_sample_without_images_costs_no_vision() -> None:
    cfg = composed("fusion=lavi")
    stage = parse(cfg)[3]
    staged = entered(cfg, stage, "cpu")
    blind, seeing = (
        sample_cost(staged.model, batch(cfg, stage, staged, Shape(images, ASKED, ANSWERED))) for images in (0, 1)
    )
    z = Sizes.of(staged.model)
    assert blind["visual_tokens"] == 0
    assert seeing["flops_sample"] - blind["flops_sample"] > (z.encoder() + z.connector()).forward

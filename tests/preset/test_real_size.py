"""Published systems at their real size: built on the meta device from the whole configuration, counted by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.test_conf import composed

from vlmlab.cli.rules import check
from vlmlab.model.build import build_model
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import parse
from vlmlab.runs.config import plain

SO400M_LAYER = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
SO400M_384 = 14 * 14 * 3 * 1152 + 1152 + 27 * 27 * 1152
SO400M_224 = 14 * 14 * 3 * 1152 + 1152 + 16 * 16 * 1152
CLIP_LAYER = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
CLIP_336 = 14 * 14 * 3 * 1024 + 1024 + (24 * 24 + 1) * 1024 + 2 * 1024  # a class token and a norm; no bias


def mlp(width: int, out: int) -> int:
    return width * out + out + out * out + out


PARTS: dict[str, dict[str, int]] = {
    "improved_alignment_900m": {
        "encoder": SO400M_384 + 26 * SO400M_LAYER,  # the last layer is above the tapped one
        "connector": 1_836_800,  # methods: 1152 * 896 + 896 + 896 * 896 + 896
        "lm": 494_032_768,
    },
    "llava_1_5_7b": {
        "encoder": CLIP_336 + 23 * CLIP_LAYER,
        "connector": mlp(1024, 4096),
        "lm": 6_738_415_616,
    },
    "llava_onevision_0_5b": {
        "encoder": SO400M_384 + 26 * SO400M_LAYER,
        "connector": mlp(1152, 896),
        "lm": 494_032_768,
    },
    "paligemma_3b": {
        "encoder": SO400M_224 + 27 * SO400M_LAYER + 2 * 1152,  # the norm after the last layer; no pooling head
        "connector": 1152 * 2048 + 2048,
        "lm": 2_506_172_416,
    },
}
TOTAL = {  # billions
    "improved_alignment_900m": (0.88, 0.95),
    "llava_1_5_7b": (7.0, 7.1),
    "llava_onevision_0_5b": (0.88, 0.95),
    "paligemma_3b": (2.9, 2.95),
}
TOKENS = {"improved_alignment_900m": 729, "llava_1_5_7b": 576, "llava_onevision_0_5b": 729, "paligemma_3b": 256}


def built(preset: str) -> tuple[Any, VLM]:
    cfg = composed(f"preset={preset}")
    with torch.device("meta"):
        return cfg, build_model(cfg)


@pytest.mark.parametrize("preset", PARTS)
def test_parameters_by_part(preset: str) -> None:
    _, model = built(preset)
    count = {part: sum(p.numel() for _, p in named) for part, named in model.parts().items()}
    assert count == PARTS[preset]
    assert TOTAL[preset][0] * 1e9 <= sum(p.numel() for p in model.parameters()) <= TOTAL[preset][1] * 1e9
    assert model.tokens_per_image == TOKENS[preset] and model.sourced() == {}
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("preset", PARTS)
def test_the_recipe_fits(preset: str) -> None:
    """Every stage is a stage, trains what is there, and an image fits into a sample."""
    cfg = composed(f"preset={preset}")
    check(cfg, plain(cfg), {"preset": preset})
    stages = parse(cfg)
    assert {part for stage in stages for part in stage.train} <= {"encoder", "connector", "fusion", "lm"}
    assert all(stage.batch_size % stage.accumulate == 0 for stage in stages)
    assert cfg.collate.max_length > TOKENS[preset]


def test_the_stages_of_the_paper() -> None:
    """Four stages of one epoch; the LM is frozen first and joins later (the numbers are ours, in methods section 4)."""
    stages = parse(composed("preset=improved_alignment_900m"))
    assert ["lm" in stage.train for stage in stages] == [False, False, True, True]
    epochs = [(558, 256), (118, 256), (676, 128), (790, 128)]
    assert [stage.steps for stage in stages] == [-(-thousand * 1000 // batch) for thousand, batch in epochs]
    assert [stage.batch_size for stage in stages] == [batch for _, batch in epochs]
    assert [stage.train["connector"] for stage in stages] == [1e-3, 5e-4, 1e-4, 2e-5]
    assert [stage.prompt for stage in stages] == ["plain", "chat", "chat", "chat"]
    assert not any("encoder" in stage.train for stage in stages)

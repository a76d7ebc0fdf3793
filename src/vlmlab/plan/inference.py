"""What answers of a composition cost at any size, without a weight: ``engine.inference`` on tensors of shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmlab.contracts.errors import UserError
from vlmlab.data.collate import Collator
from vlmlab.engine.inference import Reading, read
from vlmlab.engine.restore import module_class
from vlmlab.engine.weights import StagedModel
from vlmlab.model.vlm import VLM
from vlmlab.plan.plan import Shape, half_precision, shaped_batch
from vlmlab.plan.simulation import Meter, shapes_only, value_errors
from vlmlab.recipe.stage import parse

LONGEST = 32_768
"""Positions of a prompt: who sees whom is looked up for each pair of them."""


@dataclass(frozen=True)
class InferenceCost:
    """One composition, as it is after the recipe's last stage, asked once.

    Attributes:
        params: all weights.
        added: those that are in no tower: connector, fusion, adapters.
        visual_tokens: positions of one image in the LM's sequence.
        reading: FLOPs, and bytes that are kept.
        weights: bytes of all weights.
        peak: most bytes beside the weights at once, while the prompt is read and one token written.
    """

    params: int
    added: int
    visual_tokens: int
    reading: Reading
    weights: int
    peak: int


def inference_costs(cfg: DictConfig, prompts: Sequence[tuple[int, int]]) -> list[InferenceCost]:
    """Build the composition on the meta device and send prompts through it, one after the other.

    Args:
        cfg: the composition.
        prompts: images and text tokens of each.

    Raises:
        UserError: the model does not answer, or decides on values that are not there.
    """
    staged, collate = _asked(cfg)
    model = cast(VLM, staged.model.eval())
    half = half_precision(cfg)
    model.to(torch.bfloat16 if half else torch.float32)  # no step follows that would want the 32 bits
    return [_counted(model, replace(collate, pack_length=None), images, tokens, half) for images, tokens in prompts]


def _counted(model: VLM, collate: Collator, images: int, tokens: int, half: bool) -> InferenceCost:
    if (positions := images * model.tokens_per_image + tokens) > LONGEST:
        raise UserError(
            f"images={images} and tokens={tokens} make a prompt of {positions:,}; at most {LONGEST:,} are counted."
        )
    batch = shaped_batch(collate, [Shape(images, tokens, 0)])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    half_on = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with shapes_only(model, fake, []) as known, Meter(fake, known) as meter, value_errors(), half_on:
        reading = read(model, batch, lambda: meter.flops)
    params = sum(p.numel() for p in model.parameters())
    return InferenceCost(
        params=params,
        added=model.added(),
        visual_tokens=model.tokens_per_image,
        reading=reading,
        weights=params * (2 if half else 4),
        peak=meter.peak,
    )


def _asked(cfg: DictConfig) -> tuple[StagedModel, Collator]:
    """The composition as its last stage has it, and the collator of that stage.

    Raises:
        UserError: the last stage trains no model that answers.
    """
    stages = parse(cfg)
    kind = module_class(stages[-1])
    with torch.device("meta"):
        staged = StagedModel(kind.build(cfg))
        for stage in stages:
            if module_class(stage).build == kind.build:
                staged.enter(stage)
    if not isinstance(staged.model, VLM):
        raise UserError(
            f"{stages[-1].key('module')}={stages[-1].module} trains no model that answers; nothing is read."
        )
    collate: Any = kind.collator(cfg, staged.model, stages[-1].prompt or kind.prompt)
    return staged, collate


def as_json(cost: InferenceCost, answer: int) -> dict[str, Any]:
    """Everything as plain values; `answer`: tokens of an answer."""
    plain = asdict(cost)
    reading = plain.pop("reading")
    return plain | reading | {"first": cost.reading.first, "answering": cost.reading.answering(answer)}

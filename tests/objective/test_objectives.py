"""Losses against double loops and against transformers' own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from tests import tiny
from tests.tiny import ONE_TURN, TWO_TURNS, choices, collator, spread, vlm
from torch import nn
from torch.nn import functional as F

from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Pairing
from vlmlab.fusion.moe import MixtureOfExperts
from vlmlab.objective.lm import LanguageModelling
from vlmlab.objective.siglip import Siglip

EMPTY: Batch = None  # type: ignore[assignment]  # neither loss reads more than the outputs


def pairing(n: int = 5, width: int = 8) -> Pairing:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, width, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return Pairing(image, text, torch.tensor(10.0).log().requires_grad_(), torch.tensor(-3.0, requires_grad=True))


def outputs(pair: Pairing | None = None) -> Outputs:
    generator = torch.Generator().manual_seed(1)
    return Outputs(torch.randn(7, 11, generator=generator), torch.arange(7), pairing=pair)


def test_siglip_is_the_double_loop() -> None:
    pair = pairing()
    total, count = Siglip()(outputs(pair), EMPTY)["siglip"]
    want = 0.0
    for i in range(5):
        for j in range(5):
            score = 10 * float((pair.image[i] @ pair.text[j]).detach()) - 3
            want += math.log1p(math.exp(-score if i == j else score))
    assert abs(float(total.detach()) - want) < 1e-4 and int(count) == 5


def test_siglip_has_transformers_form_and_gradients() -> None:
    """SiglipModel: scores (text, image), ``-sum(logsigmoid((2 eye - 1) * scores), -1).mean()``."""
    gradients = []
    for mine in (True, False):
        pair = pairing()
        if mine:
            total, count = Siglip()(outputs(pair), EMPTY)["siglip"]
            loss = total / count
        else:
            scores = pair.text @ pair.image.t() * pair.log_scale.exp() + pair.bias
            loss = -F.logsigmoid((2 * torch.eye(5) - 1) * scores).sum(-1).mean()
        loss.backward()
        gradients.append([loss.detach(), *(t.grad for t in (pair.image, pair.text, pair.log_scale, pair.bias))])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_siglip_without_a_pair_is_refused() -> None:
    with pytest.raises(UserError, match="ContrastiveModule"):
        Siglip()(outputs(), EMPTY)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_language_modelling_formula(smoothing: float) -> None:
    out = outputs()
    total, count = LanguageModelling(label_smoothing=smoothing)(out, EMPTY)["lm"]
    want = 0.0
    for row, target in zip(out.logits.tolist(), out.targets.tolist(), strict=True):
        norm = math.log(sum(math.exp(v) for v in row))
        want += (1 - smoothing) * (norm - row[target]) + smoothing * sum(norm - v for v in row) / len(row)
    assert abs(float(total) - want) < 1e-4 and int(count) == 7


def test_half_precision_logits_are_summed_in_single() -> None:
    out = outputs()
    total, _ = LanguageModelling()(Outputs(out.logits.bfloat16(), out.targets), EMPTY)["lm"]
    assert total.dtype == torch.float32


PAIRED = ("medslip",)
"""Built on two towers, which no VLM has; see test_dual_streams."""


@pytest.mark.parametrize("path", [p for p in choices("objective") if p.stem not in PAIRED], ids=lambda p: p.stem)
def test_every_objective_gives_sum_and_count(path: object) -> None:
    described = tiny.loaded(path)
    objective = instantiate(described)
    assert objective.weight == described.get("weight", 1.0) and isinstance(objective.per_micro_batch, bool)
    fusion = MixtureOfExperts() if getattr(objective, "reads_experts", False) else None
    connector = spread(QFormerConnector(32, 32, queries=4, layers=2, heads=2, text=True), seed=1)
    model = vlm(connector=connector, fusion=fusion)
    if isinstance(objective, nn.Module):
        model.set_objectives({"objective": objective})
    batch = collator(model)([ONE_TURN, TWO_TURNS])
    out = model(batch)
    pair = pairing(2, 128)  # as wide as the shipped teacher's
    pairs = replace(batch, texts=("red circle", "green square"), sample_ids=[["one"]] * 2)
    parts = objective(replace(out, pairing=pair), pairs)
    for total, count in parts.values():
        assert total.shape == count.shape == () and count > 0 and total > 0

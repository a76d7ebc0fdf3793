"""Distillation between pairs of towers: each term by a loop, what the teacher gives, what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine.test_pair import samples, stage_of
from tests.tiny import worst
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Pairing
from vlmlab.engine.pair import PairModule
from vlmlab.objective.feature_distillation import FeatureDistillation
from vlmlab.objective.open_vocabulary import OpenVocabularyDistillation

ROWS, WIDTH = 4, 6
CLASSES = ["cat", "dog", "cow", "ant", "bee"]


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Fixed(torch.nn.Module):
    """A teacher that is looked up."""

    def judge(self, pixels: Tensor, texts: Sequence[str]) -> Pairing:
        return Pairing(unit(ROWS, 1), unit(len(texts), 2), torch.tensor(1.2), torch.tensor(0.0))


def student() -> tuple[Outputs, Any]:
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (2.0, -1.0))
    pair = Pairing(unit(ROWS, 3).requires_grad_(), unit(ROWS, 4).requires_grad_(), scale, bias)
    blank: Any = torch.zeros(ROWS, 3, 1, 1, dtype=torch.uint8)
    ids = [["a"], ["b"], ["c"], ["d"]]
    batch = Batch(blank, blank, blank, None, None, ids, texts=("cow", "cat", "cat", "bee"))  # type: ignore[arg-type]
    return Outputs(torch.zeros(0, 1), torch.zeros(0), pairing=pair), batch


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_distances_are_the_loop(distance: Any) -> None:
    outputs, batch = student()
    found = FeatureDistillation(Fixed(), distance, image=0.5)(outputs, batch)  # type: ignore[arg-type]
    pair, other = outputs.pairing, Fixed().judge(batch.pixels, batch.texts)
    assert pair is not None and [int(count) for _, count in found.values()] == [ROWS, ROWS]
    for side, name, factor in ((0, "image_distance", 0.5), (1, "text_distance", 1.0)):
        mine, theirs = ((p.image, p.text)[side].tolist() for p in (pair, other))
        if distance == "squared":
            want = sum((a - b) ** 2 for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))
        else:
            want = sum(1 - sum(a * b for a, b in zip(x, y, strict=True)) for x, y in zip(mine, theirs, strict=True))
        assert found[name][0].item() == pytest.approx(factor * want, abs=1e-5)
    sum(total for total, _ in found.values()).backward()  # type: ignore[union-attr]
    assert float(pair.log_scale.grad) == float(pair.bias.grad) == 0.0 and pair.text.grad is not None  # type: ignore[arg-type]


def log_softmax(row: list[float]) -> list[float]:
    whole = math.log(sum(math.exp(value) for value in row))
    return [value - whole for value in row]


def test_the_three_terms_are_the_loop() -> None:
    outputs, batch = student()
    objective = OpenVocabularyDistillation(Fixed(), CLASSES, top=2.0, k=3, temperature=0.5, softness=1.5)  # type: ignore[arg-type]
    found = {name: (total.item(), int(count)) for name, (total, count) in objective(outputs, batch).items()}
    mine, theirs, texts = outputs.pairing.image.tolist(), unit(ROWS, 1).tolist(), unit(5, 2).tolist()  # type: ignore[union-attr]

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    right = [CLASSES.index(text) for text in batch.texts]
    classes = images = top = 0.0
    for i in range(ROWS):
        said = [math.exp(2.0) * dot(mine[i], t) for t in texts]
        told = [math.exp(1.2) * dot(theirs[i], t) for t in texts]
        classes -= log_softmax(said)[right[i]]
        rows = (
            [dot(mine[i], theirs[j]) / 0.5 for j in range(ROWS)],
            [dot(mine[j], theirs[i]) / 0.5 for j in range(ROWS)],
        )
        images -= sum(log_softmax(row)[i] for row in rows) / 2
        chosen = sorted(range(5), key=lambda c: -told[c])[:3]
        p, q = (log_softmax([scores[c] / 1.5 for c in chosen]) for scores in (told, said))
        top += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    assert found["classes"] == (pytest.approx(classes, abs=1e-4), ROWS)
    assert found["images"] == (pytest.approx(images, abs=1e-4), ROWS)
    assert found["top_classes"] == (pytest.approx(2 * top, abs=1e-4), ROWS)
    some = OpenVocabularyDistillation(Fixed(), CLASSES, images=0, top=0)  # type: ignore[arg-type]
    assert set(some(outputs, batch)) == {"classes"}


def test_what_cannot_be_distilled_is_refused() -> None:
    outputs, batch = student()
    with pytest.raises(UserError, match="objective=dc_clip needs a stage of PairModule"):
        FeatureDistillation(Fixed())(replace(outputs, pairing=None), batch)  # type: ignore[arg-type]
    narrow = replace(outputs, pairing=replace(outputs.pairing, image=torch.ones(ROWS, 2)))  # type: ignore[type-var]
    with pytest.raises(UserError, match=r"width 2 and the teacher's 6; set dual_encoder\.width=6"):
        FeatureDistillation(Fixed())(narrow, batch)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"objective\.classes lacks 'cow', the class of sample a"):
        OpenVocabularyDistillation(Fixed(), CLASSES[:1])(outputs, batch)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"objective\.prompts\.fox is none of objective\.classes"):
        OpenVocabularyDistillation(Fixed(), CLASSES, {"fox": "red"})  # type: ignore[arg-type]


def test_a_pair_that_teaches_itself_has_nothing_to_learn() -> None:
    """The teacher sees the student's pixels and texts as itself, and is not part of the model."""
    cfg, module, model = stage_of("text_tower.projection_size=16")
    batch = PairModule.collator(cfg, model, "plain")(samples(cfg, 4))
    objective = FeatureDistillation(model.eval())  # type: ignore[arg-type]
    found = objective(model(batch), batch)
    assert all(total.item() < 1e-10 for total, _ in found.values())
    assert not isinstance(objective, torch.nn.Module) and module.rates
    assert worst(model.judge(batch.pixels, batch.texts).text, model.embed_texts(batch.texts)) == 0
    half = F.interpolate(batch.pixels.float(), (32, 32)).to(torch.uint8)
    assert model.judge(half, batch.texts).image.shape == (4, 16)

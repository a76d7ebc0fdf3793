"""Terms beside a contrast of pairs: hard negatives, texts among themselves, centres of classes; each by a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.tiny import worst
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch, Outputs, Pairing
from vlmlab.objective.cluster_attribution import ClusterAttribution
from vlmlab.objective.hard_negatives import HardNegatives
from vlmlab.objective.overuse import Overuse
from vlmlab.objective.text_contrast import TextContrast

ROWS = 7
IDS = ["a", "a", "a", "b", "c", "c", "d"]
TEXTS = ("a red circle.", "two squares", "a Circle, big", "nothing", "one ring", "a square", "a circle")


def case(seed: int = 0) -> tuple[Outputs, Any]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(ROWS, 5, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    pair = Pairing(image, text, torch.tensor(1.3, requires_grad=True), torch.tensor(-2.0, requires_grad=True))
    blank: Any = torch.zeros(ROWS, 1)
    batch = Batch(blank, blank, blank, None, None, [[name] for name in IDS], texts=TEXTS)  # type: ignore[arg-type]
    return Outputs(blank, blank, pairing=pair), batch


def cosines(a: Tensor, b: Tensor) -> list[list[float]]:
    return [[sum(x * y for x, y in zip(u, v, strict=True)) for v in b.tolist()] for u in a.tolist()]


def lse(values: list[float]) -> float:
    return math.log(sum(math.exp(value) for value in values))


def test_hard_negatives_are_the_loop() -> None:
    outputs, batch = case()
    pair: Any = outputs.pairing
    total, count = HardNegatives(hinge=0.7, margin=0.3)(outputs, batch)["hard_negatives"]
    own, want, rows = cosines(pair.image, pair.text), 0.0, 0
    for i in range(ROWS):
        group = [j for j in range(ROWS) if IDS[j] == IDS[i]]
        if len(group) > 1:
            rows += 1
            want += lse([math.exp(1.3) * own[i][j] for j in group]) - math.exp(1.3) * own[i][i]
            want += 0.7 * max(0.0, 0.3 - own[i][i] + max(own[i][j] for j in group if j != i))
    assert total.item() == pytest.approx(want, abs=1e-4) and int(count) == rows == 5
    total.backward()
    assert all(
        t.grad is not None and t.grad.isfinite().all() for t in (pair.image, pair.text, pair.log_scale, pair.bias)
    )
    assert worst(pair.image.grad[3], torch.zeros(5)) == 0  # alone in its sample


@pytest.mark.parametrize(("nearest", "same"), [(2, 0.95), (10, 0.2)])
def test_texts_among_themselves_are_the_loop(nearest: int, same: float) -> None:
    outputs, batch = case()
    pair: Any = outputs.pairing
    total, count = TextContrast(nearest, same)(outputs, batch)["text_contrast"]
    own, want, rows = cosines(pair.text, pair.text), 0.0, 0
    for i in range(ROWS):
        others = sorted((own[i][j] for j in range(ROWS) if j != i and own[i][j] <= same), reverse=True)[:nearest]
        if others:
            rows += 1
            want += lse(others)
    assert total.item() == pytest.approx(want, abs=1e-4) and int(count) == rows
    total.backward()
    assert pair.text.grad.isfinite().all() and pair.text.grad.any() and not pair.image.grad.any()


@pytest.mark.parametrize("softness", [0.0, 0.2])
def test_centres_of_classes_are_the_loop(softness: float) -> None:
    outputs, batch = case()
    pair: Any = outputs.pairing
    objective = ClusterAttribution(["circle", "square", "ring", "star"], temperature=0.5, softness=softness)
    total, count = objective(outputs, batch)["cluster_attribution"]
    classes = [0, None, 0, None, 2, 1, 0]  # whole words alone: "squares" is not a square
    want = 0.0
    for mine, other in ((pair.image, pair.text), (pair.text, pair.image)):
        centres = {}
        for k in (0, 1, 2):
            members = [other[r].tolist() for r in range(ROWS) if classes[r] == k]
            centres[k] = [sum(values) / len(members) for values in zip(*members, strict=True)]
        for r, k in enumerate(classes):
            if k is not None:
                scores = [
                    sum(a * b for a, b in zip(mine[r].tolist(), centres[c], strict=True)) / 0.5 for c in (0, 1, 2)
                ]
                lost = [lse(scores) - score for score in scores]
                want += ((1 - softness) * lost[k] + softness * sum(lost) / 3) / 2
    assert total.item() == pytest.approx(want, abs=1e-4) and int(count) == 5
    none = ClusterAttribution(["star"])(outputs, batch)["cluster_attribution"]
    assert none[0].item() == 0.0 and int(none[1]) == 0 and none[0].requires_grad


def test_overuse_is_the_loop() -> None:
    outputs, batch = case()
    pair: Any = outputs.pairing
    total, count = Overuse()(outputs, batch)["overuse"]
    want = 0.0
    for side in (pair.image.tolist(), pair.text.tolist()):
        want += sum((sum(column) / ROWS) ** 2 for column in zip(*side, strict=True))
    assert (total / count).item() == pytest.approx(want, abs=1e-5) and int(count) == ROWS
    (total / count).backward()
    mean = pair.image.detach().mean(0)
    assert worst(pair.image.grad, (2 * mean / ROWS).expand(ROWS, 5)) < 1e-6


@pytest.mark.parametrize("objective", [HardNegatives(), TextContrast(), Overuse(), ClusterAttribution(["x"])])
def test_without_pairs_they_are_refused(objective: Any) -> None:
    outputs, batch = case()
    with pytest.raises(UserError, match="needs a stage of PairModule"):
        objective(Outputs(outputs.logits, outputs.targets), batch)

"""Heads of a pair that compare something else than pooled outputs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.engine.test_pair import SMALL, samples
from tests.test_conf import composed
from tests.tiny import worst
from torch import Tensor
from torch.nn import functional as F

from vlmlab.contracts.tensors import Textual, Visual
from vlmlab.engine.pair import PairModule
from vlmlab.model.pair import PairedTowers
from vlmlab.objective.clip import Clip
from vlmlab.pair_head.fdt import FiniteDiscreteTokens, sparsemax
from vlmlab.pair_head.lexical import Lexical

CONF = Path(__file__).resolve().parents[2] / "conf"


def projection(row: list[float]) -> list[float]:
    """The nearest point of the simplex by bisection on its threshold."""
    low, high = min(row) - 1, max(row)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(v - middle, 0) for v in row) > 1 else (low, middle)
    return [max(v - low, 0) for v in row]


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    rows = torch.randn(20, 9, generator=torch.Generator().manual_seed(0)).double() * 2
    found = sparsemax(rows)
    assert worst(found, torch.tensor([projection(row) for row in rows.tolist()], dtype=torch.float64)) < 1e-9
    assert worst(found.sum(-1), torch.ones(20).double()) < 1e-9 and (found == 0).float().mean() > 0.3
    assert torch.autograd.gradcheck(sparsemax, (rows[:3].requires_grad_(),))


def head(**keys: object) -> FiniteDiscreteTokens:
    torch.manual_seed(0)
    found = FiniteDiscreteTokens(codes=7, width=4, temperature=0.5, **keys)  # type: ignore[arg-type]
    found.attach(6, 5)
    return found


@pytest.mark.parametrize("pool", ["max", "mean"])
@torch.no_grad()
def test_discrete_tokens_are_the_loop(pool: str) -> None:
    ours, generator = head(pool=pool), torch.Generator().manual_seed(1)
    states = torch.randn(2, 3, 5, generator=generator)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    found = ours.of_text(Textual(states, states[:, 0], valid))
    codes = ours.codebook.tolist()
    for row in range(2):
        scores = []
        for position in range(int(valid[row].sum())):
            query = ours.text(states[row, position]).tolist()
            scores.append([sum(a * b for a, b in zip(query, code, strict=True)) / (2.0 * 0.5) for code in codes])
        pooled = [max(column) if pool == "max" else sum(column) / len(column) for column in zip(*scores, strict=True)]
        weights = projection(pooled)
        mixed = [sum(w * code[d] for w, code in zip(weights, codes, strict=True)) for d in range(4)]
        length = math.sqrt(sum(v * v for v in mixed))
        assert worst(found[row], torch.tensor([v / length for v in mixed])) < 1e-5
    grid = torch.randn(2, 3, 6, generator=generator)
    pooled_image: Tensor = ours.of_image(Visual([grid], None, torch.zeros(2, 2)))
    assert worst(pooled_image, F.normalize(ours.image_weights(grid) @ ours.codebook, dim=-1)) < 1e-6


def test_padding_has_no_say() -> None:
    ours = head()
    states = torch.randn(1, 3, 5)
    other = states.clone()
    other[0, 2] = 99.0
    valid = torch.tensor([[True, True, False]])
    assert torch.equal(
        ours.of_text(Textual(states, states[:, 0], valid)), ours.of_text(Textual(other, states[:, 0], valid))
    )


@torch.no_grad()
def test_lexical_weights_are_the_loop() -> None:
    torch.manual_seed(0)
    ours = Lexical(words=9, width=4)
    ours.attach(6, 5)
    states = torch.randn(2, 3, 5)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    found = ours.of_text(Textual(states, states[:, 0], valid))
    for row in range(2):
        mapped = [ours.text(states[row, t]).tolist() for t in range(int(valid[row].sum()))]
        weights = []
        for code in ours.codebook.tolist():
            best = max(sum(a * b for a, b in zip(one, code, strict=True)) for one in mapped)
            weights.append(math.log(1 + max(best, 0.0)))
        length = math.sqrt(sum(w * w for w in weights))
        assert worst(found[row], torch.tensor([w / length for w in weights])) < 1e-5 and 0.0 in weights
    grid = torch.randn(2, 3, 6)
    assert (ours.of_image(Visual([grid], None, torch.zeros(2, 2))) >= 0).all()


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "pair_head").glob("*.yaml")))
def test_every_head_trains_whole_and_embeds_as_it_trains(name: str) -> None:
    cfg = composed(*SMALL, f"+pair_head@dual_encoder.head={name}")
    torch.manual_seed(0)
    model = PairModule.build(cfg)
    assert isinstance(model, PairedTowers)
    rows = samples(cfg, 4)
    batch = PairModule.collator(cfg, model, "plain")(rows)
    outputs = model(batch)
    assert outputs.pairing is not None
    assert worst(outputs.pairing.image.norm(dim=-1), torch.ones(4)) < 1e-5
    total, count = Clip()(outputs, batch)["clip"]
    (total / count).backward()
    parts = model.parts()
    assert all(p.grad is not None for named in parts.values() for _, p in named)
    model.eval()
    assert worst(model.embed_images([s.images[0] for s in rows]), model(batch).pairing.image) < 1e-5
    assert worst(model.embed_texts(batch.texts), model(batch).pairing.text) < 1e-5

"""Codes of visual features from the LM's states, by loops."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import ONE_TURN, TEXT_ONLY, TWO_IMAGES, TWO_TURNS, collator, spread, vlm, worst

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch
from vlmlab.fusion.none import NoFusion
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM
from vlmlab.objective.asvr import SemanticReconstruction, k_means, shares


def built(**keys: object) -> tuple[VLM, SemanticReconstruction, Batch]:
    model = vlm(mask=Causal())
    objective = SemanticReconstruction(codes=6, hidden=20, **keys)  # type: ignore[arg-type]
    model.set_objectives({"objective": objective})
    spread(objective, seed=4, scale=0.3)
    return model, objective, collator(model)([TWO_IMAGES, TEXT_ONLY, ONE_TURN])


@pytest.mark.parametrize("shift", [0, 1])
def test_it_is_the_loop(shift: int) -> None:
    model, objective, batch = built(shift=shift)
    outputs = model(batch)
    total, count = objective(outputs, batch)["asvr"]
    features = torch.cat(outputs.seen.visual.grids, -1).detach()  # (3, 16, 32)
    states = outputs.states.detach()
    want, asked, seen = 0.0, 0, 0
    for b in range(3):
        for k in range(states.shape[1]):
            if not batch.layout.visual[b, k]:
                continue
            feature = features[seen // 16, seen % 16]
            seen += 1
            code = min(range(6), key=lambda c: float((feature - objective.codebook[c]).square().sum()))
            row = objective.head(states[b, k - shift]).tolist()
            want += math.log(sum(math.exp(v) for v in row)) - row[code]
            asked += 1
    assert seen == 48 and int(count) == asked == objective.counts(batch)["asvr"]
    assert abs(float(total.detach()) - want) < 1e-4 * want
    total.backward()
    assert all(p.grad.abs().max() > 0 for p in objective.head.parameters())
    assert model.lm.model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_the_codebook_is_fitted_once_and_kept() -> None:
    model, objective, batch = built()
    text = collator(model)([TEXT_ONLY])
    total, count = objective(model(text), text)["asvr"]
    assert float(total.detach()) == 0.0 and int(count) == 0 and not objective.fitted, "no image, nothing to fit on"
    objective(model(batch), batch)
    book = objective.codebook.clone()
    assert bool(objective.fitted) and len(book.unique(dim=0)) == 6
    other = collator(model)([TWO_TURNS])
    objective(model(other), other)
    assert torch.equal(objective.codebook, book)
    assert {"codebook", "fitted"} <= objective.state_dict().keys()


def test_k_means_finds_clusters_and_is_a_fixed_point() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (true[:, None] + torch.randn(3, 20, 2, generator=generator)).flatten(0, 1)
    centres = k_means(points, 3, 20)
    assert worst(centres[torch.cdist(true, centres).argmin(1)], points.view(3, 20, 2).mean(1)) < 1e-5
    assert torch.equal(centres, k_means(points, 3, 20))
    before, after = (torch.cdist(points, k_means(points, 8, n)).amin(1).square().sum() for n in (0, 10))
    assert after < before
    few = k_means(points[:2], 4, 3)
    assert few.shape == (4, 2) and bool(few.isfinite().all())


def test_fewer_tokens_answer_for_their_share() -> None:
    grid = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    assert shares(grid, (4, 4), 16) is grid
    square = shares(grid, (4, 4), 4)
    assert worst(square[:, 1], grid[:, [2, 3, 6, 7]].mean(1)) < 1e-6
    run = shares(grid, (4, 4), 8)
    assert worst(run[:, 3], grid[:, [6, 7]].mean(1)) < 1e-6


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="shift=2"):
        SemanticReconstruction(shift=2)
    with pytest.raises(UserError, match="mask=causal"):
        vlm().set_objectives({"objective": SemanticReconstruction(shift=1)})
    blind = VLM(None, None, NoFusion(), vlm().lm, Causal())
    with pytest.raises(UserError, match="fusion=concat"):
        blind.set_objectives({"objective": SemanticReconstruction()})

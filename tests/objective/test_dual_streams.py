"""MeDSLIP's terms by loops, what the texts say, and that all of its weights train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.engine.test_pair import SMALL, samples
from tests.test_conf import composed
from torch.nn import functional as F

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Outputs
from vlmlab.engine.pair import PairModule
from vlmlab.objective.dual_streams import DualStreams

FINDINGS, PLACES = ["circle", "square", "ring"], ["row one", "row two"]


def case() -> tuple[Any, Any, DualStreams]:
    cfg = composed(*SMALL)
    torch.manual_seed(0)
    model: Any = PairModule.build(cfg)
    objective = DualStreams(FINDINGS, PLACES, width=8, heads=2, pairs_factor=0.5, temperature=0.5)
    model.set_objectives({"own": objective})
    source = samples(cfg, 3)
    texts = ("a red circle in row two, a ring in row one.", "two rings: a square in row two", "nothing.")
    rows = [type(s)(s.id, s.images, (type(s.turns[0])("", t),)) for s, t in zip(source, texts, strict=True)]
    return model, PairModule.collator(cfg, model, "plain")(rows), objective


def test_what_is_where_comes_from_the_phrases() -> None:
    _, batch, objective = case()
    told = objective.mentioned(batch.texts)
    assert [tuple(place) for place in told.nonzero().tolist()] == [(0, 0, 1), (0, 2, 0), (1, 1, 1)]
    assert objective.named(batch.texts, "findings").tolist() == [
        [1, 0, 1],
        [0, 1, 0],
        [0, 0, 0],
    ]  # "rings" is not a ring
    assert objective.named(batch.texts, "places").tolist() == [[1, 1], [0, 1], [0, 0]]


def test_the_terms_are_the_loop() -> None:
    model, batch, objective = case()
    with torch.no_grad():
        outputs = model(batch)
        found = {name: (total.item(), int(count)) for name, (total, count) in objective(outputs, batch).items()}
        patches = objective.features(torch.cat(outputs.seen.visual.grids, -1))
        states = {kind: stream(patches) for kind, stream in objective.streams.items()}
        presence = prototypes = pairs = 0.0
        there = 0
        for kind, names in (("findings", FINDINGS), ("places", PLACES)):
            own = objective.named(batch.texts, kind)
            read = F.normalize(objective.prototype(model.lm(model.lm.tokenise(names)).pooled), dim=-1)
            for b in range(3):
                for c in range(len(names)):
                    logits = objective.present(states[kind][b, c]).tolist()
                    presence += math.log(sum(map(math.exp, logits))) - logits[int(own[b, c])]
                    if own[b, c]:
                        there += 1
                        scores = (F.normalize(states[kind][b, c], dim=-1) @ read.T / 0.5).tolist()
                        prototypes += math.log(sum(map(math.exp, scores))) - scores[c]
        told = objective.mentioned(batch.texts)
        for b in range(3):
            for p in range(3):
                for a in range(2):
                    score = float(states["findings"][b, p] @ states["places"][b, a])
                    pairs += math.log1p(math.exp(-score if told[b, p, a] else score))
    assert found["presence"] == (pytest.approx(presence, abs=1e-4), 15)
    assert found["prototypes"] == (pytest.approx(prototypes, abs=1e-4), there) and there == 6
    assert found["pairs"] == (pytest.approx(0.5 * pairs, abs=1e-4), 18)


def test_all_of_it_trains_and_nothing_of_the_towers_is_in_it() -> None:
    model, batch, objective = case()
    sum(total for total, _ in objective(model(batch), batch).values()).backward()  # type: ignore[union-attr]
    names = {name for name, _ in model.parts()["objective"]}
    assert names and all(p.grad is not None for _, p in model.parts()["objective"])
    assert not any("lm" in name or "encoder" in name for name in names)
    assert any(p.grad is not None for _, p in model.parts()["encoder"])
    with pytest.raises(UserError, match="objective=medslip needs a stage of PairModule"):
        objective(Outputs(torch.zeros(0, 1), torch.zeros(0)), batch)

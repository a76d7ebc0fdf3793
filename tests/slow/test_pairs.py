"""A sample of the all-pairs design: each row runs or is refused by a sentence; experiments/all_pairs runs all of it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from tests.slow.pairs import Compositions, attempt, design, factors, pairs_of, sentences, summary

SEED, SHARE = 0, 20  # one row in twenty


def test_the_design_holds_every_pair() -> None:
    choices = factors()
    every = [(group, name) for group, names in choices.items() for name in names]
    wanted = {frozenset(p) for p in itertools.combinations(every, 2) if p[0][0] != p[1][0]}
    rows = design(choices)
    assert set().union(*map(pairs_of, rows)) == wanted
    assert rows == design(choices)
    assert len(rows) < len(wanted) / 3  # choices that combine with nothing need a row for each of their pairs


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sample_of_the_pairs_or_is_refused_by_a_sentence(tmp_path: Path) -> None:
    rows = design()
    chosen = random.Random(SEED).sample(rows, len(rows) // SHARE)
    make = Compositions()
    outcomes = [attempt(row, make, tmp_path / str(index)) for index, row in enumerate(chosen)]
    print(summary(outcomes))
    print(sentences(outcomes))
    kinds = {outcome.kind for outcome in outcomes}
    assert "failed" not in kinds, sentences([outcome for outcome in outcomes if outcome.kind == "failed"])
    assert "ran" in kinds and "rule" in kinds
    for outcome in outcomes:
        assert "\n" not in outcome.message, outcome
        assert outcome.kind != "rule" or outcome.seconds < 2, outcome

"""Steps to a threshold and the log-rank test on them, against scipy."""

from __future__ import annotations

from math import comb, sqrt

import numpy as np
import pytest
from scipy.stats import CensoredData, logrank

from vlmlab.analyse.steps import GAP, Passage, Threshold, logrank_p, logrank_scores, median, passage
from vlmlab.contracts.errors import UserError

OTHER = {"held_out/short/loss": 1.0, "held_out/short/shuffled_loss": 1.5}
ROWS = [
    {"stage": "align", "step": 0, "held_out/loss": 3.0, "held_out/shuffled_loss": 3.0},
    {"stage": "align", "step": 10, "loss": 1.0},
    {"stage": "align", "step": 20, "held_out/loss": 2.0, "held_out/shuffled_loss": 2.05, **OTHER},
    {"stage": "dense", "step": 0, "held_out/loss": 2.5, "held_out/shuffled_loss": 2.5},
    {"stage": "dense", "step": 10, "held_out/loss": 1.0, "held_out/shuffled_loss": 1.5},
    {"stage": "dense", "step": 20, "held_out/loss": "nan", "held_out/shuffled_loss": 1.5},
]


@pytest.mark.parametrize(
    ("until", "found"),
    [
        ("held_out/loss<2.2", Passage(20, False)),
        ("dense:held_out/loss<2.2", Passage(30, False)),
        ("held_out/gap > 0.1", Passage(30, False)),
        ("align:held_out/gap>0.1", Passage(20, True)),
        ("held_out/short/gap>0.1", Passage(20, False)),
        ("held_out/short/gap>0.7", Passage(20, True)),
        ("held_out/loss<0.5", Passage(30, True)),
        ("accuracy>0.5", None),
    ],
)
def test_passages_count_steps_over_all_stages(until: str, found: Passage | None) -> None:
    assert passage(ROWS, Threshold.parse(until)) == found


@pytest.mark.parametrize("until", ["", "loss", "loss<", "loss=3", "loss<x", "<3", "loss<1e"])
def test_a_threshold_that_is_none_is_refused(until: str) -> None:
    with pytest.raises(UserError, match=f"{GAP}>0.1"):
        Threshold.parse(until)


FIRST = [Passage(step, step == 200) for step in (100, 150, 200, 120, 90)]
SECOND = [Passage(step, step == 200) for step in (200, 200, 180, 200, 150)]


def test_logrank_scores_are_those_of_scipy() -> None:
    both = [*FIRST, *SECOND]
    scores = logrank_scores(both)
    assert scores.sum() == pytest.approx(0.0, abs=1e-12)
    steps = np.array([one.step for one in both])
    variance = 0.0
    for at in {one.step for one in both if not one.censored}:
        risk, ours = (steps >= at).sum(), (steps[:5] >= at).sum()
        events = sum(one.step == at and not one.censored for one in both)
        variance += events * ours / risk * (1 - ours / risk) * (risk - events) / (risk - 1)
    theirs = logrank(*(_censored(group) for group in (FIRST, SECOND)))
    assert scores[:5].sum() / sqrt(variance) == pytest.approx(theirs.statistic)


def _censored(group: list[Passage]) -> CensoredData:
    return CensoredData(
        uncensored=[one.step for one in group if not one.censored], right=[one.step for one in group if one.censored]
    )


def test_permutation_p() -> None:
    early, late = [Passage(10 + i, False) for i in range(4)], [Passage(100 + i, False) for i in range(4)]
    assert logrank_p(early, late) == pytest.approx(2 / comb(8, 4))
    never = [Passage(200, True)] * 4
    assert logrank_p(never, never) == 1.0
    assert logrank_p(early, never) == pytest.approx(2 / comb(8, 4))
    theirs = logrank(_censored(FIRST), _censored(SECOND)).pvalue
    assert logrank_p(FIRST, SECOND) == pytest.approx(theirs, abs=0.05)


def test_median_with_censored_runs() -> None:
    assert str(median(FIRST)) == "120"
    assert str(median(SECOND)) == ">200"

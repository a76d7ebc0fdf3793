"""Steps until a held-out number passes a threshold, censored where training ended first, and tests on them.

Learning to look is often a jump: at a fixed step scores fall into two heaps, and their mean is the score of no run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmlab.analyse.stats import Numbers
from vlmlab.contracts.errors import UserError

GAP = "held_out/gap"
"""``held_out/shuffled_loss`` minus ``held_out/loss``: what right images are worth, in nats per token; of the samples
``<name>`` of ``evaluation.watched``, ``held_out/<name>/gap``."""
RESAMPLES = 20_000
"""Up to so many ways to deal the runs to two groups all are gone through; beyond, so many are drawn."""


@dataclass(frozen=True)
class Threshold:
    """``[<stage>:]<name> < <number>`` or ``>``, of a number in ``metrics.jsonl``.

    Attributes:
        text: as it was given.
        name: of the number, or `GAP`.
        below: whether it is passed downwards.
        limit: the number to pass.
        stage: only its rows count; empty: all.
    """

    text: str
    name: str
    below: bool
    limit: float
    stage: str = ""

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """The threshold that a text says.

        Raises:
            UserError: it says none.
        """
        found = re.fullmatch(r"(?:([\w.-]+):)?\s*([\w./-]+)\s*([<>])\s*([-+.\deE]+)", text.strip())
        try:
            if found is None:
                raise ValueError
            return cls(text.strip(), found[2], found[3] == "<", float(found[4]), found[1] or "")
        except ValueError:
            raise UserError(
                f"until={text} is not a threshold; write a number of metrics.jsonl, < or >, and a limit, as in "
                f"'until={GAP}>0.1' or 'until=dense:held_out/loss<0.5'"
            ) from None

    def passed(self, value: float) -> bool:
        """Whether a value is beyond the limit."""
        return value < self.limit if self.below else value > self.limit


@dataclass(frozen=True)
class Passage:
    """When one run passed a threshold.

    Attributes:
        step: the first step, counted over all its stages, at which it was seen beyond; or the last one looked at.
        censored: whether it was never seen beyond.
    """

    step: float
    censored: bool

    def __str__(self) -> str:
        return f"{'>' if self.censored else ''}{self.step:.0f}"


@dataclass(frozen=True)
class Seen:
    """One number at one look.

    Attributes:
        step: counted over all stages.
        stage: that was trained.
        value: the number.
    """

    step: float
    stage: str
    value: float


def seen(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Seen]:
    """A number's looks in the rows of ``metrics.jsonl``; of `GAP`, where both of its losses are."""
    before, last, stage = 0.0, 0.0, None
    for row in rows:
        if not isinstance(row.get("step"), int | float):
            continue
        if row.get("stage") != stage:
            before, last, stage = before + last, 0.0, row.get("stage")
        last = max(last, float(row["step"]))
        value = number(row, name)
        if value is not None:
            yield Seen(before + float(row["step"]), str(stage), value)


def passage(rows: Iterable[Mapping[str, Any]], threshold: Threshold) -> Passage | None:
    """When the rows of ``metrics.jsonl`` first pass a threshold; None where none of them has the number."""
    last = None
    for look in seen(rows, threshold.name):
        if threshold.stage and look.stage != threshold.stage:
            continue
        if threshold.passed(look.value):
            return Passage(look.step, censored=False)
        last = look.step
    return None if last is None else Passage(last, censored=True)


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a row; of `GAP`, and others of that name, the difference of its two losses; None: it has none."""
    place, _, last = name.rpartition("/")
    if last == "gap" and name not in row:
        loss, shuffled = number(row, f"{place}/loss"), number(row, f"{place}/shuffled_loss")
        return None if loss is None or shuffled is None else shuffled - loss
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def logrank_scores(passages: Sequence[Passage]) -> Numbers:
    """Each run's part (N,) of the log-rank statistic: observed less expected passages; they sum to 0."""
    times = np.array([one.step for one in passages])
    events = np.array([not one.censored for one in passages])
    at = np.unique(times[events])
    hazard = (events[None, :] & (times[None, :] == at[:, None])).sum(1) / (times[None, :] >= at[:, None]).sum(1)
    expected = (hazard[:, None] * (times[None, :] >= at[:, None])).sum(0)
    scores: Numbers = events - expected
    return scores


def logrank_p(first: Sequence[Passage], second: Sequence[Passage]) -> float:
    """Two-sided permutation p value of the log-rank statistic of two groups of runs.

    Its normal approximation (``scipy.stats.logrank``) wants more runs than a sweep has seeds; the runs are dealt to the
    two groups in all ways instead, or in `RESAMPLES` random ones.
    """
    from scipy.stats import permutation_test

    scores = logrank_scores([*first, *second])
    if not np.any(scores):
        return 1.0
    found = permutation_test(
        (scores[: len(first)], scores[len(first) :]),
        lambda chosen, rest, axis: chosen.sum(axis),
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def median(passages: Sequence[Passage]) -> Passage:
    """The Kaplan-Meier median; censored at the latest look where at most half of the runs have passed."""
    left, last = 1.0, max(one.step for one in passages)
    for step in sorted({one.step for one in passages if not one.censored}):
        at_risk = sum(one.step >= step for one in passages)
        left *= 1 - sum(one.step == step and not one.censored for one in passages) / at_risk
        if left <= 0.5:
            return Passage(step, censored=False)
    return Passage(last, censored=True)

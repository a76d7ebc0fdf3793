"""The compositions of a sweep against one declared baseline: differences with intervals, tests, a sentence for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmlab.analyse.answers import Scored, aligned, scored
from vlmlab.analyse.combination import Combination, short_names
from vlmlab.analyse.questions import Variance, over_both, split_variance
from vlmlab.analyse.results import MetricKey, RunRecord
from vlmlab.analyse.stats import (
    LEVEL,
    Interval,
    beyond_reach,
    holm,
    mean_interval,
    paired_difference,
    sign_flip_p,
)
from vlmlab.analyse.steps import Passage, Threshold, logrank_p, median, passage, seen
from vlmlab.contracts.errors import UserError
from vlmlab.runs.files import read_rows

SHOWN_ROWS = 6
"""Rows that a refusal names."""


@dataclass(frozen=True)
class Comparison:
    """One composition against the baseline.

    Attributes:
        row: the composition.
        score: its own mean and interval over seeds; None where it has none.
        difference: its score minus the baseline's, over common seeds: the interval is of the t distribution and covers
            the expected difference on this test set. None without a common seed.
        both: the same difference with an interval for other seeds and other questions alike; None where single answers
            are not known, or there are too few of either.
        questions: that all compared runs were asked, 0 where single answers are not known.
        images: that they are about.
        p_value: of the sign-flip test; None without a common seed.
        adjusted: the same after Holm over all comparisons of the table.
    """

    row: Combination
    score: Interval | None
    difference: Interval | None
    both: Interval | None = None
    questions: int = 0
    images: int = 0
    p_value: float | None = None
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """``higher``, ``lower``, ``not distinguishable``, or ``no common seed``."""
        if self.difference is None or self.adjusted is None:
            return "no common seed"
        if self.adjusted >= 1 - LEVEL:
            return "not distinguishable"
        return "higher" if self.difference.mean > 0 else "lower"

    def sentence(self, baseline: str) -> str:
        """One line that can be quoted."""
        if self.difference is None:
            return f"{self.row.label} against {baseline}: no common seed"
        interval = "no interval" if self.difference.half is None else f"interval {self.difference.ends}"
        both = "" if self.both is None else f" (for other questions too: {self.both.ends})"
        p = "" if self.adjusted is None else f", p = {self.adjusted:.2g}"
        return (
            f"{self.row.label} against {baseline}: {self.verdict}: {self.difference.mean:+.3f}, {interval}{both}, "
            f"n = {self.difference.n}{p}"
        )


def chosen_row(rows: Sequence[Combination], wanted: str) -> Combination:
    """The one composition that ``mlp,bidir`` or ``connector=mlp,mask=bidir`` names.

    Raises:
        UserError: it names none, or several.
    """
    parts = [part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", wanted) if part.strip()]
    found = [row for row in rows if all(_has(row, part) for part in parts)]
    exact = [row for row in found if len(parts) == len(row.values)]
    if (len(found) != 1 and len(exact) != 1) or not parts:
        known = " | ".join(row.label for row in rows[:SHOWN_ROWS]) + (" | ..." if rows[SHOWN_ROWS:] else "")
        count = f"names {len(found)} rows" if found and parts else "names no row"
        raise UserError(f"baseline={wanted} {count} of the sweep; give one of: {known}")
    return found[0] if len(found) == 1 else exact[0]


def _has(row: Combination, part: str) -> bool:
    """Whether a composition has a value, or this value of this key."""
    key, given, value = part.partition("=")
    if not given:
        return part in row.values.values()
    keys = list(row.values)
    named = dict(zip(short_names(keys), keys, strict=True))
    return row.values.get(named.get(key, key)) == value


def compare(
    rows: Sequence[Combination], baseline: Combination, metric: str, single_answers: bool = True
) -> list[Comparison]:
    """Every other composition against the baseline, in the order of the table.

    Args:
        rows: of the sweep.
        baseline: one of them.
        metric: as in ``result.json``.
        single_answers: read the predictions, for the interval over seeds and questions.

    Raises:
        UserError: no finished cell of the baseline has the metric.
        DataError: predictions are damaged.
    """
    base = baseline.by_seed(metric)
    if not base:
        known = sorted({name for record in baseline.finished for name in record.metrics if "/count" not in name})
        shown = ", ".join(known[:SHOWN_ROWS]) + (", ..." if known[SHOWN_ROWS:] else "")
        raise UserError(f"no finished cell of {baseline.label} has metric={metric}; it has {shown or 'none'}")
    key = MetricKey.parse(metric)
    answers = _answers(baseline, key) if single_answers else {}
    found = [_compared(row, base, answers, metric) for row in rows if row is not baseline]
    adjusted = _adjusted([one.p_value for one in found])
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def _adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """P values after Holm over those that are there."""
    known = [p for p in p_values if p is not None]
    corrected = iter(holm(known).tolist() if known else [])
    return [None if p is None else next(corrected) for p in p_values]


def _compared(row: Combination, base: Mapping[str, float], answers: Mapping[str, Scored], metric: str) -> Comparison:
    """One composition against the baseline, by itself."""
    mine = row.by_seed(metric)
    pair = paired_difference(mine, base)
    if pair is None:
        return Comparison(row, row.interval(metric), None)
    seeds = sorted(mine.keys() & base.keys())
    p_value = float(sign_flip_p([mine[seed] - base[seed] for seed in seeds]))
    plain = Comparison(row, row.interval(metric), pair.difference, p_value=p_value)
    key = MetricKey.parse(metric)
    own = _answers(row, key) if answers else {}
    if not all(seed in own and seed in answers for seed in seeds):
        return plain
    runs = [own[seed] for seed in seeds] + [answers[seed] for seed in seeds]
    scores, images = aligned(runs, key)
    n = int(images.max()) + 1 if images.size else 0
    if min(n, len(seeds)) < 2:
        return replace(plain, questions=len(images), images=n)
    both = over_both(scores[: len(seeds)] - scores[len(seeds) :], images)
    return replace(plain, both=both, questions=len(images), images=n)


def _answers(row: Combination, key: MetricKey) -> dict[str, Scored]:
    """Seed to the answers that a metric is computed from, where they are known."""
    found = {seed: scored(record.folder, key.benchmark, key.baseline) for seed, record in row.of_seed(str(key)).items()}
    return {seed: answers for seed, answers in found.items() if answers is not None and answers.questions(key)}


def variance(row: Combination, metric: str) -> Variance | None:
    """Where the variance of one answer's score comes from; None where it cannot be told apart."""
    key = MetricKey.parse(metric)
    runs = list(_answers(row, key).values())
    if len(runs) < 2:
        return None
    try:
        return split_variance(*aligned(runs, key))
    except ValueError:
        return None


def reach(comparisons: Sequence[Comparison]) -> str | None:
    """The sentence that no comparison of the table can be significant, where the seeds are too few."""
    tested = [one.difference.n for one in comparisons if one.difference is not None]
    return beyond_reach(max(tested), len(tested)) if tested else None


# -- steps to a threshold ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """When the seeds of one composition passed a threshold, and whether that is earlier or later than the baseline's.

    Attributes:
        row: the composition.
        passages: of its finished cells.
        p_value: of the log-rank permutation test against the baseline; None of the baseline itself.
        adjusted: the same after Holm.
    """

    row: Combination
    passages: list[Passage]
    p_value: float | None = None
    adjusted: float | None = None

    @property
    def passed(self) -> int:
        """How many seeds passed it."""
        return sum(not one.censored for one in self.passages)

    @property
    def median(self) -> str:
        """Kaplan-Meier median, ``>`` where it lies beyond the last look."""
        return str(median(self.passages)) if self.passages else "-"


Rows = Callable[[RunRecord], Iterable[Mapping[str, Any]]]
"""Gives the rows of ``metrics.jsonl`` of a run."""


def rows_of(record: RunRecord) -> list[dict[str, Any]]:
    """Those in the run's own folder."""
    return read_rows(record.folder / "metrics.jsonl")


def races(rows: Sequence[Combination], baseline: Combination, threshold: Threshold, read: Rows = rows_of) -> list[Race]:
    """Steps to a threshold of every composition, the baseline first.

    Args:
        rows: of the sweep.
        baseline: one of them.
        threshold: what to pass.
        read: gives what a run wrote while it trained.

    Raises:
        UserError: no cell of the baseline has the number in its ``metrics.jsonl``.
    """
    ordered = [baseline, *(row for row in rows if row is not baseline)]
    found = [Race(row, _passages(row, threshold, read)) for row in ordered]
    if not found[0].passages:
        raise UserError(
            f"no cell of {baseline.label} has {threshold.name} in its metrics.jsonl; train with "
            "evaluation.every=<steps>, or choose another number for until="
        )
    tested = [
        replace(one, p_value=logrank_p(one.passages, found[0].passages)) if one.passages else one for one in found[1:]
    ]
    adjusted = _adjusted([one.p_value for one in tested])
    return [found[0], *(replace(one, adjusted=p) for one, p in zip(tested, adjusted, strict=True))]


def _passages(row: Combination, threshold: Threshold, read: Rows) -> list[Passage]:
    found = (passage(read(record), threshold) for record in row.finished)
    return [one for one in found if one is not None]


def row_band(row: Combination, name: str, read: Rows = rows_of) -> list[tuple[float, Interval]]:
    """Step over all stages and mean with its interval over seeds, at every look that all finished cells have."""
    runs = [{(look.step, look.stage): look.value for look in seen(read(record), name)} for record in row.finished]
    runs = [run for run in runs if run]
    common = [key for key in runs[0] if all(key in run for run in runs)] if runs else []
    return [(step, mean_interval([run[step, stage] for run in runs])) for step, stage in common]


def row_look(row: Combination, stage: str, name: str, last: bool, read: Rows = rows_of) -> Interval | None:
    """A number at the first, or the last, look of a stage: mean with its interval over seeds."""
    found = [[look.value for look in seen(read(record), name) if look.stage == stage] for record in row.finished]
    values = [looks[-1 if last else 0] for looks in found if looks]
    return mean_interval(values) if values else None

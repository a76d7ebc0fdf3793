"""Means with t intervals over seeds, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95
FEWEST_PAIRS = 8
"""Below this number of pairs no difference is called significant: too few seeds to know their spread."""


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its interval (None where one value gives no spread) and its number of values."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end."""
        return None if self.half is None else self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" \N{PLUS-MINUS SIGN} {self.half:.3f}")


@dataclass(frozen=True)
class PairedDifference:
    """First minus second over the seeds both have.

    Attributes:
        difference: mean and t interval of the differences.
        p_value: two-sided paired t test; None under ``FEWEST_PAIRS`` pairs.
    """

    difference: Interval
    p_value: float | None

    def verdict(self, level: float = LEVEL) -> str:
        """One phrase; claims nothing under ``FEWEST_PAIRS`` pairs."""
        if self.p_value is None:
            return f"no claim: {self.difference.n} of {FEWEST_PAIRS} pairs"
        return f"{'differs' if self.p_value < 1 - level else 'no difference shown'} (p = {self.p_value:.2g})"


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's distribution with `freedom` (whole) degrees of freedom.

    The finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4: exact, no table.
    """
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {freedom}")
    theta = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = `level` (0..1, exclusive), by bisection; 12.706 for 0.95 and 1 degree of freedom."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    low, high = 0.0, 1.0
    while t_within(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and t interval of independent values (one per seed); ValueError for none."""
    if not values:
        raise ValueError("no values")
    n = len(values)
    half = t_quantile(level, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], level: float = LEVEL
) -> PairedDifference | None:
    """Difference of two compositions over their common seeds; None where they share none.

    Args:
        first: seed to score.
        second: seed to score.
        level: of the interval.
    """
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    interval = mean_interval(differences, level)
    return PairedDifference(interval, _p_value(differences) if len(differences) >= FEWEST_PAIRS else None)


def _p_value(differences: Sequence[float]) -> float:
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 0.0 if differences[0] else 1.0
    return 1 - t_within(fmean(differences) / error, len(differences) - 1)

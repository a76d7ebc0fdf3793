"""What may be said of scores from several seeds: t intervals, sign-flip tests, Holm's correction.

The unit of inference is the seed: a trained model is one observation, however many questions it was asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
MOST_EXACT = 16
"""Up to so many seeds all sign patterns are gone through; beyond, `DRAWN` of them."""
DRAWN = 2**16
TIE = 1e-9
"""Sums that differ by less than this share of the sum of absolute values count as equal: they are rounded."""

Numbers = NDArray[np.float64]


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

    @property
    def ends(self) -> str:
        """``-0.030 to 0.020``, or a dash."""
        return "-" if self.half is None else f"{self.low:.3f} to {self.high:.3f}"

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" \N{PLUS-MINUS SIGN} {self.half:.3f}")


@dataclass(frozen=True)
class ShareInterval(Interval):
    """An interval of a share that is not as wide downwards as upwards, and stays within 0 and 1.

    Attributes:
        lower, upper: its ends; ``half`` is half of what lies between them.
    """

    lower: float
    upper: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.lower

    @property
    def high(self) -> float:
        """Upper end."""
        return self.upper


@dataclass(frozen=True)
class PairedDifference:
    """First minus second over the seeds both have.

    Attributes:
        difference: mean and t interval of the differences.
        p_value: two-sided sign-flip test; None under ``FEWEST_PAIRS`` pairs, where it cannot come out under .05.
    """

    difference: Interval
    p_value: float | None

    def verdict(self, level: float = LEVEL) -> str:
        """One phrase about this one comparison; claims nothing under ``FEWEST_PAIRS`` pairs."""
        if self.p_value is None:
            return f"no claim: {self.difference.n} of {FEWEST_PAIRS} pairs"
        return f"{'differs' if self.p_value < 1 - level else 'not distinguishable'} (p = {self.p_value:.2g})"


# -- intervals over seeds ----------------------------------------------------------------------------------------------


def t_quantile(level: float, freedom: float | Numbers) -> Numbers:
    """The t with P(|T| < t) = `level` (0..1, exclusive) for degrees of freedom that need not be whole; 12.706 for 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    if np.any(np.asarray(freedom) <= 0):
        raise ValueError(f"degrees of freedom must be above 0, not {freedom}")
    from scipy.special import stdtrit

    found: Numbers = stdtrit(freedom, (1 + level) / 2)
    return found


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and t interval of independent values (one per seed); ValueError for none."""
    if not values:
        raise ValueError("no values")
    n = len(values)
    half = float(t_quantile(level, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else None
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
    p_value = float(sign_flip_p(differences)) if len(differences) >= FEWEST_PAIRS else None
    return PairedDifference(mean_interval(differences, level), p_value)


# -- tests -------------------------------------------------------------------------------------------------------------


def sign_flip_p(differences: ArrayLike) -> Numbers:
    """Two-sided p values of the sign-flip (Fisher randomisation) test that paired differences have the mean 0.

    If the two compositions do not differ, each seed's difference might as well have had the other sign: p is the share
    of sign patterns whose sum is at least as far from 0 as the one that was seen. Nothing is assumed of the
    distribution but that symmetry. Exact over all 2^n patterns up to `MOST_EXACT` differences; beyond, over `DRAWN`
    patterns of a fixed seed, with the one that was seen among them.

    Args:
        differences: (..., n), one per seed.

    Returns:
        (...), at least 2 / 2^n each.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = values.shape[-1]
    sums = np.abs(values @ _signs(n).T)
    least = np.abs(values.sum(-1, keepdims=True)) - TIE * np.abs(values).sum(-1, keepdims=True)
    p_values: Numbers = np.asarray((sums >= least).mean(-1))
    return p_values


@cache
def _signs(n: int) -> Numbers:
    """Sign patterns (P, n), the first all plus; of a pattern and its opposite, which have the same |sum|, one."""
    if n <= MOST_EXACT:
        bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n)[None, :]
        return (1.0 - 2.0 * (bits & 1)).astype(np.float64)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(DRAWN, n))
    signs[0] = 1.0
    return signs


def holm(p_values: ArrayLike) -> Numbers:
    """Holm's step-down correction: adjusted p values (..., m), to be compared with the level of the whole family.

    Holm (1979), Scand. J. Statist. 6:65. The family-wise error rate is kept whatever the tests have in common, such as
    the baseline that all are compared with.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, -1, kind="stable")
    factors = values.shape[-1] - np.arange(values.shape[-1])
    stepped = np.maximum.accumulate(np.take_along_axis(values, order, -1) * factors, -1)
    adjusted: Numbers = np.empty(values.shape, dtype=np.float64)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1.0), -1)
    return adjusted


def smallest_p(seeds: int, comparisons: int = 1) -> float:
    """The smallest p value after Holm that so many seeds can give: 2 / 2^seeds times the comparisons."""
    return min(1.0, comparisons * 2.0 ** (1 - seeds))


def fewest_seeds(comparisons: int, level: float = LEVEL) -> int:
    """The number of seeds from which any of so many comparisons can be significant; 8 for up to 6 of them."""
    seeds = 1
    while smallest_p(seeds, comparisons) >= 1 - level:
        seeds += 1
    return seeds


FEWEST_PAIRS = fewest_seeds(1)
"""Below this number of pairs a single difference cannot be significant."""


def beyond_reach(seeds: int, comparisons: int, level: float = LEVEL) -> str | None:
    """The sentence that nothing can be significant, where that is so before anything is trained."""
    if comparisons < 1 or smallest_p(seeds, comparisons) < 1 - level:
        return None
    return (
        f"with {counted(seeds, 'seed')} and {counted(comparisons, 'comparison')} nothing can be significant at "
        f"{1 - level:.2g} (the smallest possible p is {smallest_p(seeds, comparisons):.2g}); "
        f"{fewest_seeds(comparisons, level)} seeds can"
    )


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

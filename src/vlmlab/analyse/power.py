"""How many seeds a claim needs: the power of the sign-flip test after Holm, from what pilot cells vary by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vlmlab.analyse.stats import LEVEL, fewest_seeds, sign_flip_p

DRAWS = 4000
"""Simulated sets of seeds; the error of a power is at most 0.008."""
MOST_SIMULATED = 12
"""Up to so many seeds the test itself is simulated; beyond, it has the power of the t test, within two hundredths."""
MOST_SEEDS = 10_000
UPPER = 0.8
"""Confidence of the upper limit of a pilot's spread (Browne 1995, Statist. Med. 14:1933)."""


@dataclass(frozen=True)
class Spread:
    """Standard deviation between seeds of the difference of two compositions.

    Attributes:
        value: the estimate.
        freedom: its degrees of freedom.
        paired: from differences of the same seed; otherwise from single scores, taken as independent.
    """

    value: float
    freedom: int
    paired: bool

    @property
    def upper(self) -> float:
        """Its upper confidence limit: a pilot of few seeds often finds too small a spread."""
        from scipy.special import chdtri

        return self.value * math.sqrt(self.freedom / float(chdtri(self.freedom, UPPER)))


def spread(pilot: Sequence[Mapping[str, float]]) -> Spread | None:
    """The spread that pilot cells show; None where no composition has two seeds.

    Args:
        pilot: seed to score, per composition.
    """
    common = [
        [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
        for first, second in combinations(pilot, 2)
    ]
    pairs = [differences for differences in common if len(differences) > 1]
    if pairs:
        value = math.sqrt(float(np.mean([np.var(differences, ddof=1) for differences in pairs])))
        compositions = sum(len(scores) > 1 for scores in pilot)
        seeds = min(len(differences) for differences in pairs)
        return Spread(value, (compositions - 1) * (seeds - 1), paired=True)
    single = [list(scores.values()) for scores in pilot if len(scores) > 1]
    if not single:
        return None
    freedom = sum(len(scores) - 1 for scores in single)
    pooled = sum((len(scores) - 1) * float(np.var(scores, ddof=1)) for scores in single) / freedom
    return Spread(math.sqrt(2 * pooled), freedom, paired=False)


def power_of(seeds: int, effect: float, deviation: float, comparisons: int = 1, level: float = LEVEL) -> float:
    """The chance that a true difference is found significant among so many comparisons with one baseline.

    The differences are normal; the level is Holm's first, which is what one true difference among others that are none
    meets.

    Args:
        seeds: of each composition.
        effect: the true difference.
        deviation: standard deviation between seeds of that difference.
        comparisons: in the family.
        level: confidence; 1 - level is the family-wise error rate.
    """
    if seeds < fewest_seeds(comparisons, level):
        return 0.0
    if deviation <= 0:
        return 1.0 if effect else 0.0
    error_rate = (1 - level) / comparisons
    if seeds > MOST_SIMULATED:
        return _power_of_t(seeds, abs(effect) / deviation, error_rate)
    draws = np.random.default_rng(seeds).normal(abs(effect) / deviation, 1.0, size=(DRAWS, seeds))
    return float((sign_flip_p(draws) < error_rate).mean())


def _power_of_t(seeds: int, size: float, error_rate: float) -> float:
    """Power of the two-sided paired t test, by the noncentral t distribution."""
    from scipy.special import nctdtr, stdtrit

    limit = stdtrit(seeds - 1, 1 - error_rate / 2)
    return 1.0 - float(nctdtr(seeds - 1, size * math.sqrt(seeds), limit))  # the other tail adds nothing that counts


def seeds_needed(
    effect: float, deviation: float, power: float, comparisons: int = 1, level: float = LEVEL
) -> int | None:
    """The fewest seeds with at least this power; None above `MOST_SEEDS`. Arguments as for `power_of`."""
    low = fewest_seeds(comparisons, level)
    if power_of(low, effect, deviation, comparisons, level) >= power:
        return low
    high = low
    while power_of(high, effect, deviation, comparisons, level) < power:
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if power_of(middle, effect, deviation, comparisons, level) >= power else (middle, high)
        )
    return high


def smallest_effect(
    seeds: int, deviation: float, power: float, comparisons: int = 1, level: float = LEVEL
) -> float | None:
    """The smallest true difference that so many seeds find with this power; None where they can find none."""
    if seeds < fewest_seeds(comparisons, level):
        return None
    low, high = 0.0, deviation
    while power_of(seeds, high, deviation, comparisons, level) < power:
        low, high = high, 2 * high
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(seeds, middle, deviation, comparisons, level) >= power else (middle, high)
    return high

"""Power and numbers of seeds against the noncentral t distribution, and what pilot cells say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2, nct, t

from vlmlab.analyse.power import Spread, power_of, seeds_needed, smallest_effect, spread


def by_t(seeds: int, size: float, error_rate: float) -> float:
    limit, shift = t.ppf(1 - error_rate / 2, seeds - 1), size * math.sqrt(seeds)
    return float(nct.sf(limit, seeds - 1, shift) + nct.cdf(-limit, seeds - 1, shift))


def test_power() -> None:
    assert power_of(5, 10.0, 1.0) == 0.0  # no effect is large enough for five seeds
    assert power_of(7, 10.0, 1.0, comparisons=7) == 0.0
    assert power_of(6, 10.0, 1.0) == 1.0
    assert power_of(11, 0.9, 1.0) == pytest.approx(by_t(11, 0.9, 0.05), abs=0.02)  # simulated
    assert power_of(30, 0.9, 1.0, comparisons=3) == pytest.approx(by_t(30, 0.9, 0.05 / 3), abs=1e-6)
    assert power_of(8, 0.0, 1.0) == pytest.approx(12 / 256, abs=0.01)  # the level that the exact test has
    assert power_of(8, -0.03, 0.03) == power_of(8, 0.03, 0.03)
    assert (power_of(8, 0.1, 0.0), power_of(8, 0.0, 0.0)) == (1.0, 0.0)


def test_seeds_needed() -> None:
    assert seeds_needed(10.0, 1.0, 0.8) == 6
    assert seeds_needed(10.0, 1.0, 0.8, comparisons=6) == 8
    needed = seeds_needed(0.3, 1.0, 0.8)
    assert needed == next(n for n in range(13, 200) if by_t(n, 0.3, 0.05) >= 0.8)
    assert seeds_needed(1e-6, 1.0, 0.8) is None


def test_smallest_effect() -> None:
    assert smallest_effect(5, 1.0, 0.8) is None
    found = smallest_effect(8, 0.03, 0.8)
    assert found is not None and power_of(8, found, 0.03) >= 0.8 > power_of(8, found - 0.001, 0.03)


def test_spread_of_a_pilot() -> None:
    first = {"0": 0.5, "1": 0.6, "2": 0.55}
    second = {"0": 0.52, "1": 0.66, "2": 0.58, "3": 0.9}
    paired = spread([first, second])
    assert paired == Spread(pytest.approx(float(np.std([0.02, 0.06, 0.03], ddof=1))), 2, paired=True)
    single = spread([first])
    assert single == Spread(pytest.approx(0.05 * math.sqrt(2)), 2, paired=False)
    assert spread([{"0": 1.0}, {"1": 1.0}]) is None
    assert Spread(1.0, 2, True).upper == pytest.approx(math.sqrt(2 / chi2.ppf(0.2, 2)))

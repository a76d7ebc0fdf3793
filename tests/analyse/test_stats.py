"""Intervals against tabulated quantiles, tests against scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_1samp

from vlmlab.analyse.stats import (
    beyond_reach,
    fewest_seeds,
    holm,
    mean_interval,
    paired_difference,
    sign_flip_p,
    t_quantile,
)


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [  # two-sided values of the usual printed tables
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 3, 3.18245),
        (0.95, 4, 2.77645),
        (0.95, 7, 2.36462),
        (0.95, 10, 2.22814),
        (0.95, 30, 2.04227),
        (0.95, 100, 1.98397),
        (0.90, 5, 2.01505),
        (0.99, 1, 63.6567),
        (0.99, 6, 3.70743),
        (0.999, 9, 4.78091),
    ],
)
def test_t_quantile(level: float, freedom: int, quantile: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(quantile, rel=2e-6)


def test_t_tends_to_the_normal_distribution() -> None:
    assert t_quantile(0.95, 100_000) == pytest.approx(1.95996, abs=1e-4)
    assert t_quantile(0.5, 1) == pytest.approx(1.0)
    assert t_quantile(0.95, 7) < t_quantile(0.95, 6.5) < t_quantile(0.95, 6)


@pytest.mark.parametrize(("level", "freedom"), [(0.95, 0), (1.0, 3), (0.0, 3)])
def test_t_refuses(level: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        t_quantile(level, freedom)


def test_mean_interval() -> None:
    interval = mean_interval([0.8, 0.9, 1.0])
    assert interval.mean == pytest.approx(0.9)
    assert interval.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert (interval.low, interval.high) == (pytest.approx(0.651586, abs=1e-5), pytest.approx(1.148414, abs=1e-5))
    assert str(interval) == "0.900 \N{PLUS-MINUS SIGN} 0.248"


def test_one_value_has_no_interval() -> None:
    interval = mean_interval([0.5])
    assert (interval.half, interval.low, interval.high, str(interval)) == (None, None, None, "0.500")
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_paired_difference_uses_common_seeds_and_claims_nothing_from_few() -> None:
    first = {str(seed): 0.9 + 0.01 * seed for seed in range(5)} | {"only here": 0.0}
    second = {str(seed): 0.1 + 0.01 * seed + 0.001 * (seed % 2) for seed in range(5)}
    pair = paired_difference(first, second)
    assert pair is not None
    assert pair.difference.n == 5
    assert pair.difference.mean == pytest.approx(0.8 - 0.002 / 5)
    assert pair.p_value is None
    assert pair.verdict() == "no claim: 5 of 6 pairs"
    assert paired_difference({"0": 1.0}, {"1": 1.0}) is None


DRUG1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_sleep_data() -> None:
    """Student's sleep data (1908): of ten differences nine are above 0 and one is 0, so that 4 of 1024 are as far."""
    pair = paired_difference(dict(zip("abcdefghij", DRUG2, strict=True)), dict(zip("abcdefghij", DRUG1, strict=True)))
    assert pair is not None
    assert pair.p_value == 4 / 1024
    assert pair.difference.low == pytest.approx(0.7001142, abs=1e-6)
    assert pair.verdict() == "differs (p = 0.0039)"


def test_equal_scores_do_not_differ() -> None:
    scores = {str(seed): float(seed) for seed in range(8)}
    pair = paired_difference(scores, scores)
    assert pair is not None and pair.p_value == 1.0
    assert pair.verdict() == "not distinguishable (p = 1)"


def test_sign_flips_are_those_of_scipy() -> None:
    rng = np.random.default_rng(5)
    for n in (3, 6, 9):
        values = rng.normal(0.4, 1.0, n)
        exact = permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=True)
        assert sign_flip_p(values) == exact.pvalue
    many = rng.normal(0.4, 1.0, (3, 5))
    assert sign_flip_p(many).tolist() == [float(sign_flip_p(row)) for row in many]


def test_sign_flips_of_rounded_scores_count_ties() -> None:
    assert float(sign_flip_p([0.1, 0.2, -0.3])) == 1.0  # 0.1 + 0.2 - 0.3 is not quite 0
    assert float(sign_flip_p([0.3, 0.1 + 0.2, 0.3, -0.3])) == 10 / 16


def test_beyond_sixteen_seeds_patterns_are_drawn() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, 20)
    with_t = ttest_1samp(values, 0.0).pvalue
    assert float(sign_flip_p(values)) == pytest.approx(with_t, rel=0.1)
    assert float(sign_flip_p(np.ones(20))) == pytest.approx(0.0, abs=1e-4) and float(sign_flip_p(np.ones(20))) > 0


def test_holm() -> None:
    """``statsmodels.stats.multitest.multipletests(p, method="holm")`` of statsmodels 0.15.0."""
    adjusted = holm([0.01, 0.04, 0.03, 0.005, 0.2])
    assert adjusted == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])
    assert holm([[0.6, 0.7], [0.01, 0.5]]) == pytest.approx(np.array([[1.0, 1.0], [0.02, 0.5]]))


def test_what_seeds_can_show() -> None:
    assert [fewest_seeds(comparisons) for comparisons in (1, 3, 6, 7)] == [6, 7, 8, 9]
    assert beyond_reach(8, 6) is None and beyond_reach(5, 0) is None
    assert beyond_reach(8, 7) == (
        "with 8 seeds and 7 comparisons nothing can be significant at 0.05 (the smallest possible p is 0.055); "
        "9 seeds can"
    )
    assert str(beyond_reach(1, 1)).startswith("with 1 seed and 1 comparison nothing can be significant")
    adjusted = holm([float(sign_flip_p(np.ones(8)))] * 6)
    assert max(adjusted) < 0.05 <= max(holm([float(sign_flip_p(np.ones(8)))] * 7))

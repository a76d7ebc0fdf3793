"""Intervals against tabulated quantiles."""

from __future__ import annotations

import math

import pytest

from vlmlab.analyse.stats import mean_interval, paired_difference, t_quantile, t_within


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
    assert t_within(-1.0, 1) == pytest.approx(0.5)


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
    first = {str(seed): 0.9 + 0.01 * seed for seed in range(7)} | {"only here": 0.0}
    second = {str(seed): 0.1 + 0.01 * seed + 0.001 * (seed % 2) for seed in range(7)}
    pair = paired_difference(first, second)
    assert pair is not None
    assert pair.difference.n == 7
    assert pair.difference.mean == pytest.approx(0.8 - 0.003 / 7)
    assert pair.p_value is None
    assert pair.verdict() == "no claim: 7 of 8 pairs"
    assert paired_difference({"0": 1.0}, {"1": 1.0}) is None


def test_paired_t_test_of_sleep_data() -> None:
    """Student's sleep data (1908): t = 4.0621, 9 degrees of freedom, p = 0.002833."""
    drug1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    pair = paired_difference(dict(zip("abcdefghij", drug2, strict=True)), dict(zip("abcdefghij", drug1, strict=True)))
    assert pair is not None and pair.p_value is not None
    assert pair.p_value == pytest.approx(0.002833, abs=1e-6)
    assert pair.difference.low == pytest.approx(0.7001142, abs=1e-6)
    assert pair.verdict().startswith("differs")


def test_equal_scores_do_not_differ() -> None:
    scores = {str(seed): float(seed) for seed in range(8)}
    pair = paired_difference(scores, scores)
    assert pair is not None and pair.p_value == 1.0
    assert pair.verdict().startswith("no difference shown")

"""Intervals over questions and seeds, and the split of the variance, against other people's implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from vlmlab.analyse.questions import (
    both_sources,
    clustered_error,
    numbered,
    over_both,
    over_questions,
    share_over_questions,
    split_variance,
    wilson,
)

SCORES = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=float)
IMAGES = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])


def test_clustered_error_is_that_of_statsmodels() -> None:
    """``OLS(scores, ones).fit(cov_type="cluster", cov_kwds={"groups": images}).bse`` of statsmodels 0.15.0."""
    assert clustered_error(SCORES, IMAGES) == pytest.approx(0.10327955589886441, rel=1e-12)


def test_clustered_error_by_the_formulas_of_two_evaluation_libraries() -> None:
    """inspect_ai sums outer products per cluster and corrects by C / (C - 1); lmms-eval adds to the plain variance of
    the mean the products of different questions of one image, without that correction (Miller 2024, equation 4)."""
    off, n, clusters = SCORES - SCORES.mean(), len(SCORES), 4
    groups = [off[np.flatnonzero(image == IMAGES)] for image in range(clusters)]
    outer = sum(np.outer(group, group).sum() for group in groups)
    assert clustered_error(SCORES, IMAGES) == pytest.approx(math.sqrt(outer * clusters / (clusters - 1)) / n)
    crossed = sum(off[i] * off[j] for i in range(n) for j in range(n) if i != j and IMAGES[i] == IMAGES[j])
    lmms = math.sqrt(SCORES.var(ddof=1) / n + crossed / n**2)
    ours = clustered_error(SCORES, IMAGES) ** 2 * (clusters - 1) / clusters
    assert lmms**2 == pytest.approx(ours + (off**2).sum() / n**2 / (n - 1))


def test_one_question_an_image_is_the_plain_error() -> None:
    assert clustered_error(SCORES, np.arange(10)) == pytest.approx(SCORES.std(ddof=1) / math.sqrt(10))
    shuffled = np.random.default_rng(0).permutation(10)
    assert clustered_error(SCORES[shuffled], IMAGES[shuffled]) == pytest.approx(clustered_error(SCORES, IMAGES))
    assert clustered_error(np.stack([SCORES, 1 - SCORES]), IMAGES) == pytest.approx([0.1032795559] * 2)


def test_over_questions() -> None:
    interval = over_questions(SCORES, IMAGES)
    assert (interval.mean, interval.n) == (0.6, 10)
    assert interval.half == pytest.approx(3.18245 * 0.1032795559, rel=1e-5)  # 3 degrees of freedom: 4 images
    assert over_questions(SCORES, np.zeros(10, dtype=int)).half is None
    with pytest.raises(ValueError, match="one image"):
        clustered_error(SCORES, np.zeros(10, dtype=int))


def test_a_share_of_few_answers_has_wilsons_interval() -> None:
    """Against scipy's ``binomtest``."""
    assert wilson(0.3, 10, 1.959963984540054) == pytest.approx(binomtest(3, 10).proportion_ci(method="wilson"))
    assert wilson(0.0, 8, 1.959963984540054) == pytest.approx(binomtest(0, 8).proportion_ci(method="wilson"))


def test_shares_at_their_ends_have_a_width_and_others_are_as_before() -> None:
    assert share_over_questions(np.tile(SCORES, 10), np.arange(100)) == over_questions(
        np.tile(SCORES, 10), np.arange(100)
    )
    none = share_over_questions(np.zeros(8), np.arange(8))
    t = 2.364624251592784  # 7 degrees of freedom
    assert (none.mean, none.low) == (0.0, 0.0) and none.high == pytest.approx(t**2 / (8 + t**2))
    few = share_over_questions([1, 0, 0, 0, 0, 0, 0, 0], np.arange(8))
    size = (1 / 8 * 7 / 8) / (7 / 64 / 7)  # by the plain error of the mean: one less than there are
    assert (few.low, few.high) == pytest.approx(wilson(1 / 8, size, t)) and 0 < few.low < 1 / 8 < few.high < 1
    twice = share_over_questions(np.zeros(16), np.repeat(np.arange(8), 2))
    assert twice.high == none.high, "two questions about an image are no more than one where all are alike"
    assert share_over_questions([1.0, 1.0], np.zeros(2, dtype=int)).half is None


def test_the_interval_of_a_few_answers_holds_what_it_says() -> None:
    """Each number of right answers of 12, weighted by how likely it is where the true share is .05 or .9."""
    for truth in (0.05, 0.9):
        held = 0.0
        for right in range(13):
            one = share_over_questions(np.arange(12) < right, np.arange(12))
            held += math.comb(12, right) * truth**right * (1 - truth) ** (12 - right) * (one.low <= truth <= one.high)
        assert held >= 0.94


def test_numbered() -> None:
    assert numbered([("b",), ("a",), ("b",)]).tolist() == [0, 1, 0]


BALANCED = [
    [0.38, 0.52, -0.09, 0.19, 0.1, 0.33, 0.37, 0.23, 0.28, 0.42, 1.01, 0.43, 0.4, 0.42, 0.36],
    [0.37, 0.65, 0.61, 0.08, 0.2, 0.7, 0.43, 0.62, 0.62, 0.52, 1.3, 0.88, 0.17, 0.28, 0.71],
    [0.24, 0.68, 0.46, 0.44, 0.42, 0.07, 0.75, 0.18, 0.5, 0.27, 0.54, 0.53, 0.58, 0.43, 0.12],
    [-0.04, 0.55, -0.14, 0.03, -0.09, 0.43, 0.75, 0.09, 0.26, 0.38, 0.95, 0.35, 0.15, 0.11, 0.3],
]


def test_variance_is_that_of_statsmodels() -> None:
    """``MixedLM`` with the variance components seed, image and question by REML, statsmodels 0.15.0."""
    found = split_variance(BALANCED, np.repeat(np.arange(5), 3))
    parts = (found.seed, found.image, found.question, found.rest)
    assert parts == pytest.approx((0.01026649, 0.01035205, 0.0234419, 0.03978293), rel=5e-4)
    assert sum(found.shares()) == pytest.approx(1.0)


def test_variance_of_images_with_different_numbers_of_questions() -> None:
    rng = np.random.default_rng(1)
    images = np.repeat(np.arange(400), rng.integers(1, 5, 400))
    scores = rng.normal(0, 0.1, (250, 1)) + rng.normal(0, 0.3, 400)[images] + rng.normal(0, 0.2, len(images))
    found = split_variance(scores + rng.normal(0, 0.4, scores.shape), images)
    parts = (found.seed, found.image, found.question, found.rest)
    assert np.sqrt(parts) == pytest.approx([0.1, 0.3, 0.2, 0.4], rel=0.15)


def test_variance_refuses_what_cannot_be_told_apart() -> None:
    for scores, images in ((np.ones((1, 4)), [0, 0, 1, 1]), (np.ones((2, 2)), [0, 1]), (np.ones((2, 2)), [0, 0])):
        with pytest.raises(ValueError, match="two of each"):
            split_variance(scores, np.array(images))
    assert split_variance(np.ones((2, 4)), np.array([0, 0, 1, 1])).shares() == (0.0,) * 4


def test_an_interval_for_both_is_as_wide_as_its_sources() -> None:
    """Seeds without questions' noise give the t interval over seeds, and the other way round."""
    images = np.repeat(np.arange(20), 2)
    by_seed = np.array([0.1, 0.3, 0.2, 0.5])[:, None] + np.zeros(40)
    seeds_only = over_both(by_seed, images)
    assert seeds_only.half == pytest.approx(3.18245 * np.std([0.1, 0.3, 0.2, 0.5], ddof=1) / 2, rel=1e-5)
    by_question = np.random.default_rng(3).random(40) + np.zeros((4, 1))
    assert over_both(by_question, images).half == pytest.approx(over_questions(by_question[0], images).half)
    both = over_both(by_seed + by_question, images)
    assert both.half is not None and both.half < math.hypot(
        seeds_only.half or 0, over_both(by_question, images).half or 0
    )
    mean, half = both_sources(np.stack([by_seed, by_seed + by_question]), images)
    assert half == pytest.approx([seeds_only.half, both.half]) and mean[1] == pytest.approx(both.mean)
    with pytest.raises(ValueError, match="two of each"):
        over_both(by_seed[:1], images)
    assert over_both(np.ones((2, 4)), np.array([0, 0, 1, 1])).half == 0

"""Mutual information of Gaussians, which is known; counts by a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import digamma

from vlmlab.analyse.information import bootstrap, infonce_terms, ksg_terms, principal


def gaussians(correlation: float, n: int, dimensions: int = 1) -> tuple[np.ndarray, np.ndarray, float]:
    draw = np.random.default_rng(0)
    x, noise = draw.normal(size=(2, n, dimensions))
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    return x, y, -0.5 * dimensions * math.log(1 - correlation**2)


def test_neighbours_are_counted_as_in_a_loop() -> None:
    x, y, _ = gaussians(0.8, 12, 2)
    got = ksg_terms(x, y, k=3)
    for i in range(12):
        far = [max(np.abs(x[i] - x[j]).max(), np.abs(y[i] - y[j]).max()) for j in range(12) if j != i]
        reach = sorted(far)[2]
        nx, ny = (sum(np.abs(z[i] - z[j]).max() < reach for j in range(12) if j != i) for z in (x, y))
        assert got[i] == pytest.approx(digamma(3) + digamma(12) - digamma(nx + 1) - digamma(ny + 1))


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_the_estimates_are_near_the_truth(correlation: float) -> None:
    x, y, truth = gaussians(correlation, 2000)
    assert ksg_terms(x, y).mean() == pytest.approx(truth, abs=0.06)
    features = [np.hstack([z, z**2 - 1]) for z in (x, y)]  # of a Gaussian's ratio, what a bilinear critic can say
    bound = infonce_terms(*features, steps=300).mean()
    assert truth * 0.75 - 0.02 < bound < truth + 0.06  # a lower bound, of a critic held small


def test_principal_components_are_the_eigenvectors() -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(50, 3)) @ np.diag([5.0, 2.0, 1.0])
    x = np.hstack([x, x[:, :1]])  # of rank 3
    assert principal(x).shape == (50, 3)
    kept = principal(x, 2)
    _, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    for k in range(2):
        theirs = (x - x.mean(0)) @ vectors[:, -1 - k]
        assert abs(np.corrcoef(kept[:, k], theirs)[0, 1]) == pytest.approx(1, abs=1e-9)
    assert kept.var(0) == pytest.approx([1, 1])


def test_the_interval_is_that_of_a_mean() -> None:
    terms = np.random.default_rng(2).normal(1.0, 2.0, size=400)
    mean, low, high = bootstrap(terms)
    assert mean == pytest.approx(terms.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * terms.std() / 20, rel=0.1)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples have no 3 neighbours"):
        ksg_terms(np.ones((3, 1)), np.ones((3, 1)))
    with pytest.raises(ValueError, match="not two halves of 64"):
        infonce_terms(np.ones((100, 1)), np.ones((100, 1)))

"""Simulated sweeps whose truth is known: coverage, family-wise errors and power are what they are said to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr

from vlmlab.analyse.power import power_of, seeds_needed, spread
from vlmlab.analyse.questions import both_sources
from vlmlab.analyse.stats import beyond_reach, holm, sign_flip_p, t_quantile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Answers are right where ability + seed + image + question + noise (a normal number each) is above 0.

    The questions of an image and the answers of a trained model are right together; all compositions are asked the
    same questions, and a seed has a part in common for all of them.
    """

    images: int = 100
    each: int = 2
    ability: float = 0.5
    of_seed: float = 0.1
    of_pair: float = 0.05
    of_image: float = 0.6
    of_question: float = 0.4

    @property
    def clusters(self) -> NDArray[np.intp]:
        return np.repeat(np.arange(self.images), self.each)

    def questions(self, rng: np.random.Generator, sweeps: int) -> Array:
        """Easiness (R, 1, 1, N) of the questions of a test set for each sweep."""
        of_image = rng.normal(0, self.of_image, (sweeps, 1, 1, self.images))[..., self.clusters]
        easiness: Array = of_image + rng.normal(0, self.of_question, (sweeps, 1, 1, self.images * self.each))
        return easiness

    def answers(self, rng: np.random.Generator, easiness: Array, shifts: list[float], seeds: int, sweeps: int) -> Array:
        """Scores (R, K, S, N), 0 or 1, of K compositions whose abilities are shifted."""
        seed = rng.normal(0, self.of_pair, (sweeps, 1, seeds, 1))
        seed = seed + rng.normal(0, self.of_seed, (sweeps, len(shifts), seeds, 1))
        noise = rng.standard_normal((sweeps, len(shifts), seeds, easiness.shape[-1]), dtype=np.float32)
        ability = self.ability + np.array(shifts)[:, None, None]
        return (ability + seed + easiness + noise > 0).astype(np.float64)

    def expected(self, shift: float) -> float:
        """Accuracy over all seeds and all questions."""
        variance = 1 + self.of_seed**2 + self.of_pair**2 + self.of_image**2 + self.of_question**2
        return float(ndtr((self.ability + shift) / np.sqrt(variance)))

    def on(self, easiness: Array, shift: float) -> Array:
        """Accuracy (R,) over all seeds on the questions of these test sets."""
        spread = np.sqrt(1 + self.of_seed**2 + self.of_pair**2)
        found: Array = ndtr((self.ability + shift + easiness[:, 0, 0]) / spread).mean(-1)
        return found


def over_seeds(scores: Array) -> tuple[Array, Array]:
    """Means and half widths (...) over the seeds of (..., S, N)."""
    means = scores.mean(-1)
    n = means.shape[-1]
    return means.mean(-1), t_quantile(0.95, n - 1) * means.std(-1, ddof=1) / np.sqrt(n)


def coverage(world: World, seeds: int, sweeps: int, seed: int) -> dict[str, float]:
    """Share of sweeps whose 95 % interval holds the truth, for a score and for a difference with a baseline."""
    rng = np.random.default_rng(seed)
    easiness = world.questions(rng, sweeps)
    answers = world.answers(rng, easiness, [0.0, 0.15], seeds, sweeps)
    difference = answers[:, 1] - answers[:, 0]
    true = world.expected(0.15) - world.expected(0.0)
    true_here = world.on(easiness, 0.15) - world.on(easiness, 0.0)

    def held(found: tuple[Array, Array], truth: Array | float) -> float:
        return float((np.abs(found[0] - truth) <= found[1]).mean())

    return {
        "score, over seeds, of this test set": held(over_seeds(answers[:, 0]), world.on(easiness, 0.0)),
        "score, over both, of all questions": held(both_sources(answers[:, 0], world.clusters), world.expected(0.0)),
        "difference, over seeds, of this test set": held(over_seeds(difference), true_here),
        "difference, over both, of all questions": held(both_sources(difference, world.clusters), true),
        "score, over seeds, of all questions": held(over_seeds(answers[:, 0]), world.expected(0.0)),
    }


def found_significant(world: World, shifts: list[float], seeds: int, sweeps: int, seed: int) -> NDArray[np.bool_]:
    """(R, K - 1): which compositions are told from the first, by the sign-flip test after Holm."""
    rng = np.random.default_rng(seed)
    easiness = world.questions(rng, 1)  # a benchmark is the same for all
    means = world.answers(rng, easiness, shifts, seeds, sweeps).mean(-1)
    return holm(sign_flip_p(means[:, 1:] - means[:, :1])) < 0.05


def foretold(world: World, shift: float, seeds: int, comparisons: int, seed: int) -> tuple[float, float, float]:
    """The power that the plan foretells from 400 pilot seeds; the true difference and its spread between seeds."""
    easiness = world.questions(np.random.default_rng(seed), 1)
    pilot = world.answers(np.random.default_rng(seed + 1), easiness, [0.0, shift], 400, 1).mean(-1)[0]
    known = spread([{str(i): float(score) for i, score in enumerate(scores)} for scores in pilot])
    assert known is not None and known.paired
    effect = float(world.on(easiness, shift)[0] - world.on(easiness, 0.0)[0])
    return power_of(seeds, effect, known.value, comparisons), effect, known.value


def check(world: World, sweeps: int, low: float, high: float, errors: float, near: float, shift: float) -> None:
    """Hold coverage, family-wise error rate and power to their limits, for 5 and for 8 seeds."""
    for seeds in (5, 8):
        *covered, last = coverage(world, seeds, sweeps, seed=seeds).items()
        assert all(low <= share <= high for _, share in covered), (seeds, covered)
        assert last[1] < 0.9, last  # what an interval over seeds must not be taken for
        for comparisons in (1, 3, 6):
            nothing = found_significant(world, [0.0] * (comparisons + 1), seeds, sweeps, seed=10 + comparisons)
            wrong = float(nothing.any(-1).mean())
            assert wrong <= (0.0 if beyond_reach(seeds, comparisons) else errors), (seeds, comparisons, wrong)
            told, effect, deviation = foretold(world, shift, seeds, comparisons, seed=20)
            shifts = [0.0, shift, *[0.0] * (comparisons - 1)]
            seen = float(found_significant(world, shifts, seeds, sweeps, seed=20)[:, 0].mean())
            assert abs(seen - told) <= near, (seeds, comparisons, told, seen)
    told, effect, deviation = foretold(world, shift, 8, 3, seed=20)
    wanted = seeds_needed(effect, deviation, 0.8, 3)
    assert wanted is not None and wanted > 8
    seen = float(found_significant(world, [0.0, shift, 0.0, 0.0], wanted, sweeps, seed=20)[:, 0].mean())
    assert 0.8 - near <= seen <= 0.9 + near, (wanted, seen)


def test_two_hundred_sweeps() -> None:
    check(World(images=50), sweeps=200, low=0.91, high=0.985, errors=0.08, near=0.09, shift=0.32)


@pytest.mark.slow
def test_a_thousand_sweeps() -> None:
    check(World(), sweeps=1000, low=0.93, high=0.97, errors=0.065, near=0.05, shift=0.25)

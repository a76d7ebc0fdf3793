"""Intervals over the questions of a test set, over seeds and questions at once, and where the variance comes from.

Questions about one image are right or wrong together, so that images and not questions are the independent units.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmlab.analyse.stats import LEVEL, Interval, Numbers, ShareInterval, t_quantile

Indices = NDArray[np.intp]
FEW = 5
"""Right, or wrong, answers below which a mean's own error says too little of it."""


@dataclass(frozen=True)
class Variance:
    """The variance of one answer's score by where it comes from; estimates below 0 count as 0.

    Attributes:
        seed: between trained models, of their mean over questions.
        image: between images.
        question: between questions about the same image.
        rest: between the answers of different seeds to the same question, beyond their means.
    """

    seed: float
    image: float
    question: float
    rest: float

    def shares(self) -> tuple[float, ...]:
        """The four as shares of their sum; zeros where every score is the same."""
        parts = (self.seed, self.image, self.question, self.rest)
        return tuple(part / sum(parts) for part in parts) if sum(parts) > 0 else (0.0,) * 4


def numbered(names: Sequence[Hashable]) -> Indices:
    """One number per different name, in the order in which they first come."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.intp)


def clustered_error(scores: ArrayLike, images: Indices) -> Numbers:
    """Standard error (...) of the mean of scores (..., N), with the questions of one image as one unit.

    sqrt(C / (C - 1) sum_c (sum_{i in c} (s_i - mean))^2) / N: the cluster-robust error of Miller (2024), arXiv
    2411.00640, appendix A, with the correction for C images that inspect_ai makes. Plain error of the mean where each
    image has one question.

    Raises:
        ValueError: fewer than two images, whose error is unknown.
    """
    values = np.asarray(scores, dtype=np.float64)
    clusters = len(np.unique(images))
    if clusters < 2:
        raise ValueError("one image gives no error of the mean")
    sums = _by_image(values - values.mean(-1, keepdims=True), images)
    error: Numbers = np.sqrt(clusters / (clusters - 1) * (sums**2).sum(-1)) / values.shape[-1]
    return error


def over_questions(scores: ArrayLike, images: Indices, level: float = LEVEL) -> Interval:
    """Mean and t interval over images of the scores (N,) of one trained model: it says nothing of another seed."""
    values = np.asarray(scores, dtype=np.float64)
    clusters = len(np.unique(images))
    half = float(t_quantile(level, clusters - 1) * clustered_error(values, images)) if clusters > 1 else None
    return Interval(float(values.mean()), half, len(values))


def wilson(share: float, size: float, quantile: float) -> tuple[float, float]:
    """Ends of Wilson's score interval (1927, J. Am. Stat. Assoc. 22:209) of a share in 0..1.

    Args:
        share: of `size` independent answers.
        size: how many, need not be whole.
        quantile: of the normal distribution, or of t.
    """
    wide = quantile**2 / size
    middle = (share + wide / 2) / (1 + wide)
    half = quantile / (1 + wide) * math.sqrt(share * (1 - share) / size + wide / (4 * size))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_over_questions(scores: ArrayLike, images: Indices, level: float = LEVEL) -> Interval:
    """`over_questions` of scores in 0..1, by Wilson's interval where the t interval fails: few answers, or 0 or 1.

    With fewer than `FEW` images' worth of right or of wrong answers the t interval is too narrow, and of no width where
    all answers are alike. Wilson's is then taken of the number of independent answers that has the clustered error
    (Korn and Graubard 1998, Surv. Methodol. 24:193), at most one an image where there is none, with the quantile of t.
    """
    values = np.asarray(scores, dtype=np.float64)
    plain, clusters = over_questions(values, images, level), len(np.unique(images))
    spread = plain.mean * (1 - plain.mean)
    if plain.half is None or clusters * min(plain.mean, 1 - plain.mean) >= FEW:
        return plain
    error = float(clustered_error(values, images))
    size = min(len(values), spread / error**2) if error > 0 else clusters
    lower, upper = wilson(plain.mean, size, float(t_quantile(level, clusters - 1)))
    return ShareInterval(plain.mean, (upper - lower) / 2, plain.n, lower, upper)


def over_both(scores: ArrayLike, images: Indices, level: float = LEVEL) -> Interval:
    """Mean and interval of scores (S, N) for other seeds and other questions alike; see `both_sources`."""
    mean, half = both_sources(scores, images, level)
    return Interval(float(mean), float(half), np.asarray(scores).shape[0])


def both_sources(scores: ArrayLike, images: Indices, level: float = LEVEL) -> tuple[Numbers, Numbers]:
    """Means and half widths (...) of scores (..., S, N) of S seeds on the same N questions, both drawn at random.

    The two-way variance of the mean: that of the seeds' means plus the clustered one of the questions' means, less the
    variance of what is left, which both contain (Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29:238, here for
    a mean); never less than either. Degrees of freedom after Satterthwaite (1946).

    Raises:
        ValueError: fewer than two seeds or two images.
    """
    values = np.asarray(scores, dtype=np.float64)
    seeds, questions = values.shape[-2:]
    clusters = len(np.unique(images))
    if min(seeds, clusters) < 2:
        raise ValueError("an interval over seeds and images needs two of each")
    mean = values.mean((-2, -1), keepdims=True)
    of_seed = values.mean(-1, keepdims=True) - mean
    of_question = values.mean(-2, keepdims=True) - mean
    rest = values - mean - of_seed - of_question
    between_seeds = (of_seed**2).sum((-2, -1)) / (seeds * (seeds - 1))
    per_image = clusters / ((clusters - 1) * questions**2)
    between_images = per_image * (_by_image(of_question, images) ** 2).sum((-2, -1))
    in_both = per_image * (_by_image(rest, images) ** 2).sum((-2, -1)) / (seeds * (seeds - 1))
    largest = np.maximum(between_seeds, between_images)
    variance = np.maximum(between_seeds + between_images - in_both, largest)
    parts = between_seeds**2 / (seeds - 1) + between_images**2 / (clusters - 1)
    freedom = np.divide(variance**2, parts, out=np.ones_like(variance), where=parts > 0)
    return mean[..., 0, 0], t_quantile(level, freedom) * np.sqrt(variance)


def split_variance(scores: ArrayLike, images: Indices) -> Variance:
    """The variance of scores (S, N) by seed, image and question.

    Analysis of variance of random effects: seeds crossed with questions, questions nested in images that may have
    different numbers of them (Searle, Casella and McCulloch 1992, chapter 5).

    Raises:
        ValueError: fewer than two seeds, two images, or questions than would tell an image from its questions.
    """
    values = np.asarray(scores, dtype=np.float64)
    seeds, questions = values.shape
    sizes = np.bincount(images)
    sizes = sizes[sizes > 0]
    clusters = len(sizes)
    if min(seeds, clusters) < 2 or questions == clusters:
        raise ValueError("the variance of seeds, images and questions needs two of each, and two questions an image")
    mean = values.mean()
    of_seed, of_question = values.mean(1) - mean, values.mean(0) - mean
    rest = ((values - mean - of_seed[:, None] - of_question[None, :]) ** 2).sum() / ((seeds - 1) * (questions - 1))
    between_images = (_by_image(of_question, images) ** 2 / sizes).sum()
    within = seeds * ((of_question**2).sum() - between_images) / (questions - clusters)
    typical = (questions - (sizes**2).sum() / questions) / (clusters - 1)
    question = (within - rest) / seeds
    image = (seeds * between_images / (clusters - 1) - within) / (seeds * typical)
    seed = (questions * (of_seed**2).sum() / (seeds - 1) - rest) / questions
    return Variance(*(max(0.0, float(part)) for part in (seed, image, question, rest)))


def _by_image(values: Numbers, images: Indices) -> Numbers:
    """Sums over the questions of each image: (..., N) -> (..., C), in the order of the images' numbers."""
    order = np.argsort(images, kind="stable")
    starts = np.flatnonzero(np.diff(images[order], prepend=-1))
    summed: Numbers = np.add.reduceat(values[..., order], starts, axis=-1)
    return summed

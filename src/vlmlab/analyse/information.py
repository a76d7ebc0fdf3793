"""How much two representations of the same samples say of each other: estimates of mutual information.

Both estimates are means over samples of one term each, so that two representations are compared by the differences of
their terms. The estimators and their settings are our choice: EMMA (arXiv 2410.02080) shows such an analysis and its
abstract and code say neither how it estimates nor with which encoder.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

DIMENSIONS = 16
"""Principal components that are kept of each representation."""


def principal(x: Numbers, dimensions: int = DIMENSIONS) -> Numbers:
    """(n, p) -> (n, q) the first principal components, each of variance 1; q is smaller where the rank is."""
    centred = x - x.mean(0)
    u, values, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((values > 1e-9 * max(values[0], 1e-300)).sum())
    return u[:, : min(dimensions, rank)] * math.sqrt(len(x))  # type: ignore[no-any-return]


def ksg_terms(x: Numbers, y: Numbers, k: int = 3) -> Numbers:
    """(n,) terms whose mean is the nearest-neighbour estimate of the mutual information, nats.

    Kraskov, Stoegbauer and Grassberger 2004 (arXiv cond-mat/0305641), equation 8: psi(k) + psi(n) - psi(n_x + 1) -
    psi(n_y + 1), n_x being how many samples are nearer in x alone than the k-th neighbour in both. It is biased
    downwards where information is high or dimensions are many.

    Args:
        x: (n, p).
        y: (n, q).
        k: neighbours.

    Raises:
        ValueError: not more than k samples.
    """
    from scipy.spatial import KDTree
    from scipy.special import digamma

    if len(x) <= k:
        raise ValueError(f"{len(x)} samples have no {k} neighbours each")
    reach = KDTree(np.hstack([x, y])).query(np.hstack([x, y]), k + 1, p=np.inf)[0][:, -1]
    inside = np.nextafter(reach, 0)  # strictly nearer
    counts = [KDTree(z).query_ball_point(z, inside, p=np.inf, return_length=True) - 1 for z in (x, y)]
    return digamma(k) + digamma(len(x)) - digamma(counts[0] + 1) - digamma(counts[1] + 1)  # type: ignore[no-any-return]


def infonce_terms(x: Numbers, y: Numbers, seed: int = 0, batch: int = 64, steps: int = 400) -> Numbers:
    """(n / 2,) terms whose mean is a lower bound of the mutual information, nats; at most log(batch).

    van den Oord, Li and Vinyals 2018 (arXiv 1807.03748): log K - loss of telling the right y of x among K. The critic
    is [x 1] W y, and is trained on half of the samples; the terms are those of the other half.

    Args:
        x: (n, p).
        y: (n, q).
        seed: of the halves, the order and nothing else: W starts at zero.
        batch: K.
        steps: of training.

    Raises:
        ValueError: less than one batch in each half.
    """
    from scipy.special import logsumexp

    half = len(x) // 2
    if half < batch:
        raise ValueError(f"{len(x)} samples are not two halves of {batch} or more")
    x = np.hstack([x, np.ones((len(x), 1))])
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:half], order[half : half + half // batch * batch]
    weight = _critic(x[train], y[train], seed, batch, steps)
    terms = []
    for rows in test.reshape(-1, batch):
        scores = x[rows] @ weight @ y[rows].T  # (K, K)
        terms.append(np.diag(scores) - logsumexp(scores, axis=1) + math.log(batch))
    return np.concatenate(terms)


def _critic(x: Numbers, y: Numbers, seed: int, batch: int, steps: int) -> Numbers:
    """(p, q) W after training on all of x and y."""
    import torch
    from torch.nn import functional as F

    draw = np.random.default_rng(seed + 1)
    left, right = torch.from_numpy(x), torch.from_numpy(y)
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.03, weight_decay=0.1)  # weak signals overfit without decay
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.from_numpy(draw.permutation(len(x))[:batch])
            optimizer.zero_grad()
            F.cross_entropy(left[rows] @ weight @ right[rows].T, torch.arange(len(rows))).backward()
            optimizer.step()
            schedule.step()
    return weight.detach().numpy()


def bootstrap(terms: Numbers, seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """The mean of terms with the percentile interval over samples drawn again: (mean, low, high)."""
    draw = np.random.default_rng(seed)
    means = np.array([terms[draw.integers(len(terms), size=len(terms))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(terms.mean()), float(low), float(high)

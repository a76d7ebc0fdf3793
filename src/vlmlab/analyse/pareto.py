"""Which of several compositions are worth their cost: those that no other beats at the same cost or less."""

from __future__ import annotations

from collections.abc import Sequence


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Places of the points on the Pareto front, from cheap to dear: no other costs as little and scores as high.

    Args:
        costs: lower is better.
        scores: higher is better.
    """
    found: list[int] = []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i], i)):
        if not found or scores[place] > scores[found[-1]]:
            found.append(place)
    return found

from __future__ import annotations

import random

from vlmlab.analyse.pareto import front


def test_the_front_is_what_no_other_point_beats() -> None:
    draw = random.Random(0)
    for _ in range(50):
        costs, scores = ([draw.randrange(6) for _ in range(8)] for _ in range(2))
        points = list(zip(costs, scores, strict=True))
        best = {
            (cost, score)
            for cost, score in points
            if not any((c <= cost and s >= score) and (c, s) != (cost, score) for c, s in points)
        }
        found = front(costs, scores)
        assert {points[place] for place in found} == best and len(found) == len(best)
        assert [costs[place] for place in found] == sorted(costs[place] for place in found)
    assert front([], []) == []

from __future__ import annotations

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.metrics.token_f1 import TokenF1, token_f1

BY_HAND = [
    ("the left lung", "left lung", 1.0),  # articles do not count
    ("left lung", "right lung", 0.5),
    ("lung lung lung", "the lung", 0.5),  # a word counts as often as both have it: 2 * 1 / (3 + 1)
    ("in the left lower lobe of lung", "lower lobe", 2 * 2 / (6 + 2)),
    ("Two.", "2", 1.0),
    ("", "yes", 0.0),
    ("", "the", 1.0),
    ("no", "yes", 0.0),
]


@pytest.mark.parametrize(("said", "right", "score"), BY_HAND)
def test_by_hand(said: str, right: str, score: float) -> None:
    assert token_f1(said, [right]) == pytest.approx(score) == token_f1(right, [said])
    assert token_f1(said, ["something else entirely", right]) == pytest.approx(score)


def test_the_mean_and_that_of_each_kind() -> None:
    metric = TokenF1()
    for said, right, kind in (("a cat", "cat", "open"), ("dog", "cat", "open"), ("red cat", "cat", "yes/no")):
        metric.update(Row("b", "1", 0, kind, "?", said, (right,)))
    wanted = {
        "token_f1": (1 + 2 / 3) / 3,
        "token_f1/kind/open": 0.5,
        "token_f1/kind/yes/no": 2 / 3,
        "token_f1/count": 3,
    }
    assert metric.compute({"shuffled": {"token_f1": 0.9}}) == pytest.approx(wanted)
    assert metric.predicted() == pytest.approx({k: v for k, v in wanted.items() if k != "token_f1/count"})
    with pytest.raises(UserError, match="no answer"):
        metric.score(Row("b", "1", 0, "", "?", "x", ()))
    with pytest.raises(UserError, match="no question"):
        TokenF1().predicted()

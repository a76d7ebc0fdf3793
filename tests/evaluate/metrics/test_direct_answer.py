"""A-OKVQA's direct answers, against a loop."""

from __future__ import annotations

import random

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.direct_answer import DirectAnswer
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.metrics.vqa import VqaAccuracy


def test_against_a_loop() -> None:
    draw = random.Random(1)
    words = ("cat", "Cat", "dog", "a cat", "pet")
    metric, total = DirectAnswer(), 0.0
    for k in range(100):
        said, people = draw.choice(words), tuple(draw.choice(words) for _ in range(10))
        metric.update(Row("b", str(k), 0, "", "?", said, people))
        matches = 0
        for one in people:
            matches += one == said
        total += matches / 3 if matches < 3 else 1.0
    got = metric.compute()
    assert got == {"direct_answer_accuracy": pytest.approx(total / 100), "direct_answer_accuracy/count": 100}


def test_where_it_is_not_vqa_accuracy() -> None:
    people = ("cat", *("dog",) * 9)
    row = Row("b", "1", 0, "", "?", "cat", people)
    assert DirectAnswer().score(row) == pytest.approx(1 / 3) and VqaAccuracy().score(row) == pytest.approx(0.3)
    assert DirectAnswer().score(Row("b", "1", 0, "", "?", "The dog.", people)) == 0
    assert VqaAccuracy().score(Row("b", "1", 0, "", "?", "The dog.", people)) == 1


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="no question to score"):
        DirectAnswer().compute()
    with pytest.raises(UserError, match="Question 1 of b has no answer"):
        DirectAnswer().score(Row("b", "1", 0, "", "?", "cat", ()))

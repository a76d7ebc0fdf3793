"""Sensitivity to the wording, against the paper's formula in a loop."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.captions import CaptionScores
from vlmlab.evaluate.metrics.rows import Row, write_rows
from vlmlab.evaluate.metrics.scoring import predictions_file, score_predictions
from vlmlab.evaluate.metrics.sensitivity import Sensitivity
from vlmlab.evaluate.metrics.token_f1 import TokenF1
from vlmlab.evaluate.metrics.vqa import VqaAccuracy


def row(kind: str, wording: str, said: str, right: str = "red cat") -> Row:
    return Row("b", "1", 0, kind, "?", said, (right,), group=wording)


def test_against_a_loop() -> None:
    """Mean over tasks t of sigma_i / mu_i, where i runs over instructions and each score is a mean over instances."""
    draw = random.Random(0)
    tasks, instructions = ("count", "colour", "place"), ("a", "b", "c", "d", "e")
    said = {
        (t, i): [draw.choice(("red cat", "red", "dog")) for _ in range(draw.randint(3, 9))]
        for t in tasks
        for i in instructions
    }
    metric, inner = Sensitivity(TokenF1()), TokenF1()
    want = []
    for t in tasks:
        scores = []
        for i in instructions:
            total = 0.0
            for answer in said[t, i]:
                metric.update(row(t, i, answer))
                total += inner.score(row(t, i, answer))
            scores.append(total / len(said[t, i]))
        mu = sum(scores) / len(scores)
        want.append(math.sqrt(sum((s - mu) ** 2 for s in scores) / len(scores)) / mu)
    got = metric.compute()
    assert got["sensitivity"] == pytest.approx(sum(want) / 3, abs=1e-12)
    assert [got[f"sensitivity/kind/{t}"] for t in tasks] == pytest.approx(want, abs=1e-12)
    assert got["sensitivity/wordings"] == 5 and got["sensitivity/tasks"] == 3
    assert got["sensitivity/count"] == sum(map(len, said.values()))


def test_equal_wordings_and_a_task_without_a_score() -> None:
    metric = Sensitivity(VqaAccuracy())
    for wording in "ab":
        metric.update(row("count", wording, "red cat"))
        metric.update(row("never", wording, "dog"))
    assert metric.compute() == {
        "sensitivity": 0.0, "sensitivity/kind/count": 0.0,
        "sensitivity/count": 4, "sensitivity/tasks": 1, "sensitivity/wordings": 2,
    }  # fmt: skip
    nothing = Sensitivity(VqaAccuracy())
    for wording in "ab":
        nothing.update(row("never", wording, "dog"))
    assert nothing.predicted() == {} and nothing.compute()["sensitivity/tasks"] == 0


def test_what_has_no_sensitivity() -> None:
    with pytest.raises(UserError, match="CaptionScores scores no single answers"):
        Sensitivity(CaptionScores())  # type: ignore[arg-type]
    metric = Sensitivity(VqaAccuracy())
    with pytest.raises(UserError, match="no question to score"):
        metric.predicted()
    with pytest.raises(UserError, match="Question 1 of b is in no named wording; ask by"):
        metric.update(row("count", "", "x"))
    metric.update(row("count", "a", "x"))
    with pytest.raises(UserError, match="questions of kind 'count' are in one wording"):
        metric.predicted()


def test_it_is_in_the_scores_with_its_baselines(tmp_path: Path) -> None:
    for baseline, second in (("", "red cat"), ("shuffled", "dog")):
        write_rows(predictions_file(tmp_path, "b", baseline), [row("k", "a", "red cat"), row("k", "b", second)])
    got = score_predictions(tmp_path, "b", [lambda: Sensitivity(VqaAccuracy())])
    assert got["b/sensitivity"] == 0 and got["b/sensitivity/shuffled"] == 1

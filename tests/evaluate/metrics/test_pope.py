"""POPE's scores by hand and on published answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.pope import Pope, says_yes
from vlmlab.evaluate.metrics.rows import Row


def scored(answers: list[tuple[str, str]], kind: str = "") -> dict[str, float]:
    """Of (what was said, what is right)."""
    metric = Pope()
    for k, (said, right) in enumerate(answers):
        metric.update(Row("pope", str(k), 0, kind, "?", said, (right,)))
    return metric.compute()


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("No", False), ("no, there is", False), ("There is not", False), ("No.", False), ("Yes", True),
        ("yes, no", False), ("Yes. There is no dog.", True),
        ("NO", True), ("nothing", True), ("", True), ("a cat", True),
    ],
)  # fmt: skip
def test_an_answer_is_read_as_the_evaluator_does(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_by_hand() -> None:
    answers = [("yes", "yes")] * 3 + [("no", "yes")] * 2 + [("yes", "no")] + [("no", "no")] * 4
    got = scored(answers, kind="object")
    want = {"accuracy": 0.7, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 * 0.75 * 0.6 / 1.35, "yes_ratio": 0.4}
    for name, value in want.items():
        assert got[f"pope_{name}"] == got[f"pope_{name}/kind/object"] == pytest.approx(value)
    assert got["pope_accuracy/count"] == 10
    assert scored([("no", "no")]) == {f"pope_{n}": 0.0 for n in want} | {"pope_accuracy": 1.0, "pope_accuracy/count": 1}


def test_what_is_no_question_of_yes_or_no() -> None:
    with pytest.raises(UserError, match="has the answer 'red', and POPE's are yes or no"):
        scored([("yes", "red")])
    with pytest.raises(UserError, match="no question to score"):
        Pope().predicted()


@pytest.mark.parametrize("name", ["random", "popular"])
def test_published_answers(shared_data: Path, name: str) -> None:
    """LLaVA-1.5-7B's, against the official evaluator's numbers."""
    folder = shared_data / "pope"
    file = f"llava15_7b_coco_{name}_greedy.jsonl"
    rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    got = scored([(row["answer"], row["label"]) for row in rows])
    want = json.loads((folder / "expected.json").read_text())["files"][file]
    for score in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert got[f"pope_{score}"] == pytest.approx(want[score], abs=1e-12)

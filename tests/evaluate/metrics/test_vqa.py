"""VQA accuracy: normalisation, agreement, chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.pope import Pope
from vlmlab.evaluate.metrics.rows import Row, write_rows
from vlmlab.evaluate.metrics.scoring import lost_answers, predictions_file
from vlmlab.evaluate.metrics.token_f1 import TokenF1
from vlmlab.evaluate.metrics.vqa import VqaAccuracy, emptied, exact_match, normalise, soft_accuracy


def _row(prediction: str, *references: str, kind: str = "count", chance: float | None = None, group: str = "") -> Row:
    return Row("test", "7", 2, kind, "How many?", prediction, references, chance, group=group)


def _load(shared_data: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shared_data / "vqa_metric_fixtures" / name).read_text(encoding="utf-8"))
    return loaded


def test_official_soft_accuracy(shared_data: Path) -> None:
    fixture = _load(shared_data, "vqa_accuracy.json")
    metric, by_type = VqaAccuracy(), {}
    for item in fixture["items"]:
        answers = tuple(answer["answer"] for answer in item["answers"])
        accuracy = soft_accuracy(item["prediction"], answers)
        assert 100 * accuracy == pytest.approx(item["expected_accuracy"], abs=0.00501), item["question_id"]
        by_type.setdefault(item["answer_type"], []).append(accuracy)
        metric.update(_row(item["prediction"], *answers, kind=item["answer_type"]))
    scores = metric.compute()
    expected = fixture["expected"]
    assert 100 * scores["vqa_accuracy"] == pytest.approx(expected["overall"], abs=0.00501)
    for kind, value in expected["perAnswerType"].items():
        assert 100 * scores[f"vqa_accuracy/kind/{kind}"] == pytest.approx(value, abs=0.00501)
        assert scores[f"vqa_accuracy/kind/{kind}"] == pytest.approx(fmean(by_type[kind]))


def test_exact_match_on_a_real_models_answers(shared_data: Path) -> None:
    fixture = _load(shared_data, "vqa_rad_predictions.json")
    metric = VqaAccuracy()
    for item in fixture["items"]:
        metric.update(_row(item["prediction"], item["answer"], kind=item["answer_type"]))
    scores = metric.compute()
    expected = fixture["expected"]
    assert scores["vqa_accuracy/count"] == expected["n"]
    assert 100 * scores["vqa_accuracy"] == pytest.approx(expected["overall"], abs=0.00501)
    for kind in ("CLOSED", "OPEN"):
        assert 100 * scores[f"vqa_accuracy/kind/{kind}"] == pytest.approx(expected[kind], abs=0.00501)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The  Cat.", "cat"),
        ("a man, an egg", "man egg"),
        ("TWO", "2"),
        ("dont", "don't"),
        ("black/white", "black white"),
        ("1,000!", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("yes\n", "yes"),
        ("side - by", "side by"),
    ],
)
def test_normalise(answer: str, same: str) -> None:
    assert normalise(answer) == same


def test_exact_match_takes_any_reference() -> None:
    assert exact_match("The red one.", ["blue", "red 1"]) == 1.0
    assert exact_match("reddish", ["red"]) == 0.0
    assert exact_match("", ["red"]) == 0.0


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_soft_accuracy_of_agreeing_annotators(agreeing: int, expected: float) -> None:
    annotators = ("red",) * agreeing + tuple(f"colour {n}" for n in range(10 - agreeing))
    assert soft_accuracy("Red.", annotators) == pytest.approx(expected)


def test_unanimous_annotators_are_compared_to_the_letter() -> None:
    assert soft_accuracy("Red", ("red",) * 10) == 0.0
    assert soft_accuracy("red", ("red",) * 10) == 1.0


def test_accuracy_per_kind_with_chance() -> None:
    metric = VqaAccuracy()
    metric.update(_row("2", "two", chance=0.2))
    metric.update(_row("3", "two", chance=0.2))
    metric.update(_row("yes", "yes", kind="existence", chance=0.5))
    metric.update(_row("yes", "yes", kind="existence", chance=0.5))
    assert metric.compute() == pytest.approx(
        {
            "vqa_accuracy": 0.75,
            "vqa_accuracy/count": 4,
            "vqa_accuracy/kind/count": 0.5,
            "vqa_accuracy/kind/existence": 1.0,
            "chance": 0.35,
            "chance/kind/count": 0.2,
            "chance/kind/existence": 0.5,
            "floor/chance": 0.35,
            "floor/chance/kind/count": 0.2,
            "floor/chance/kind/existence": 0.5,
            "normalised": 0.4 / 0.65,
            "normalised/kind/count": 0.375,
            "normalised/kind/existence": 1.0,
        }
    )
    assert set(metric.predicted()) == {"vqa_accuracy", "vqa_accuracy/kind/count", "vqa_accuracy/kind/existence"}


def test_normalised_is_over_the_highest_floor_and_says_which() -> None:
    metric = VqaAccuracy()
    metric.update(_row("2", "two", chance=0.2))
    metric.update(_row("3", "two", chance=0.2))
    metric.update(_row("no", "yes", kind="existence", chance=0.5))
    metric.update(_row("yes", "yes", kind="existence", chance=0.5))
    floors = {
        "shuffled": {"vqa_accuracy": 0.25, "vqa_accuracy/kind/count": 0.0, "vqa_accuracy/kind/existence": 0.5},
        "lookup": {"vqa_accuracy": 0.75, "vqa_accuracy/kind/count": 0.5, "vqa_accuracy/kind/existence": 1.0},
    }
    scores = metric.compute(floors)
    assert {name: value for name, value in scores.items() if name.startswith(("floor", "normalised"))} == {
        "floor/lookup": 0.75,
        "normalised": -1.0,  # under the floor
        "floor/lookup/kind/count": 0.5,
        "normalised/kind/count": 0.0,
    }  # no share of nothing: the lookup answers every question of the other kind
    assert scores["chance"] == 0.35 and scores["vqa_accuracy"] == 0.5
    equal = metric.compute({"shuffled": {"vqa_accuracy": 0.35, "vqa_accuracy/kind/count": 0.2}})
    assert "floor/chance" in equal and "floor/chance/kind/count" in equal  # of equal floors the one stated beforehand


def test_floors_count_without_a_stated_chance() -> None:
    metric = VqaAccuracy()
    metric.update(_row("2", "two"))
    metric.update(_row("3", "two"))
    scores = metric.compute({"no_image": {"vqa_accuracy": 0.25, "vqa_accuracy/kind/count": 0.25}})
    assert scores["floor/no_image"] == 0.25 and scores["normalised"] == pytest.approx(1 / 3)
    assert not {name for name in metric.compute() if name.startswith(("floor", "normalised"))}


def test_groups_are_scored_apart_across_kinds() -> None:
    metric = VqaAccuracy()
    metric.update(_row("2", "two", chance=0.2, group="held_out_pair"))
    metric.update(_row("no", "yes", kind="existence", chance=0.5, group="held_out_pair"))
    metric.update(_row("yes", "yes", kind="existence", chance=0.5, group="other"))
    scores = metric.compute({"lookup": {"vqa_accuracy/held_out_pair": 0.4}})
    assert {name: value for name, value in scores.items() if "held_out_pair" in name or "other" in name} == (
        pytest.approx(
            {
                "vqa_accuracy/held_out_pair": 0.5,
                "vqa_accuracy/held_out_pair/count": 2,
                "chance/held_out_pair": 0.35,
                "floor/lookup/held_out_pair": 0.4,
                "normalised/held_out_pair": 1 / 6,
                "vqa_accuracy/other": 1.0,
                "vqa_accuracy/other/count": 1,
                "chance/other": 0.5,
                "floor/chance/other": 0.5,
                "normalised/other": 1.0,
            }
        )
    )
    assert metric.predicted()["vqa_accuracy/held_out_pair"] == 0.5  # so its floors have it too
    assert scores["vqa_accuracy/count"] == 3


def test_chance_is_left_out_where_a_question_lacks_it() -> None:
    metric = VqaAccuracy()
    metric.update(_row("2", "two", chance=0.2))
    metric.update(_row("yes", "yes", kind="existence"))
    scores = metric.compute()
    assert "chance" not in scores and "normalised" not in scores
    assert scores["chance/kind/count"] == 0.2


def test_number_of_annotators_is_a_key() -> None:
    references = ("red", "red", "blue")
    exact, agreed = VqaAccuracy(), VqaAccuracy(annotators=3)
    assert exact.score(_row("blue", *references)) == 1.0
    assert agreed.score(_row("blue", *references)) == pytest.approx(2 / 9)
    with pytest.raises(UserError, match="at least 2"):
        VqaAccuracy(annotators=1)


def test_user_errors() -> None:
    with pytest.raises(UserError, match="Question 7 turn 2 of test"):
        VqaAccuracy().update(_row("x"))
    with pytest.raises(UserError, match="no question to score"):
        VqaAccuracy().compute()


# -- answers that the normalisation empties ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "lost"),
    [("A", True), ("the", True), ("an", True), ("?", True), ("a.", True), ("B", False), ("none", False), ("", False)],
)
def test_what_is_left_of_an_answer(answer: str, lost: bool) -> None:
    assert emptied(answer) is lost


@pytest.mark.parametrize("metric", [VqaAccuracy, TokenF1])
def test_letters_as_options_are_refused(metric: type[VqaAccuracy | TokenF1]) -> None:
    """The trap: with "A" right, an empty answer and "the" are right, too."""
    free = Row("b", "7", 0, "", "?", "the", ("A",))
    assert metric().score(free) == 1
    with pytest.raises(
        UserError, match=r"Question 7 of b has the option 'A', of which the VQA evaluator's normalisation"
    ):
        metric().score(replace(free, options=("A", "B")))


def test_right_answers_that_are_lost_are_noted(tmp_path: Path) -> None:
    rows = [Row("b", str(k), 0, "", "?", "", (answer,)) for k, answer in enumerate(("a", "red", "The"))]
    write_rows(predictions_file(tmp_path, "b"), rows)
    assert lost_answers(tmp_path, "b", [Pope]) == []
    (note,) = lost_answers(tmp_path, "b", [VqaAccuracy])
    assert note.startswith("b: VqaAccuracy leaves nothing of the right answer of 2 of 3 questions (as of 'a': it drops")

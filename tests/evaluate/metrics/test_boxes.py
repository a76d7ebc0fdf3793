from __future__ import annotations

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.boxes import box_text
from vlmlab.evaluate.metrics.boxes import BoxAccuracy
from vlmlab.evaluate.metrics.form import AnswerForm, form
from vlmlab.evaluate.metrics.rows import Row


def row(said: str, *right: str, kind: str = "refer", chance: float | None = 0.25) -> Row:
    return Row("b", "1", 0, kind, "where?", said, right, chance)


RIGHT = "<box>(0,0),(500,500)</box>"


def test_accuracy_and_overlap_by_hand() -> None:
    """Overlap 1, then 1/2 exactly, then 1/7, then nothing that is a box, then a box upside down."""
    metric = BoxAccuracy()
    said = (
        RIGHT,
        "<box>(0,0),(500,250)</box>",
        "at <box>(250,250),(750,750)</box>",
        "row one",
        "<box>(9,9),(3,3)</box>",
    )
    for text in said:
        metric.update(row(text, RIGHT))
    overlaps = [1, 0.5, 1 / 7, 0, 0]
    shuffled = {"iou_accuracy": 0.3, "iou": 0.4, "readable": 1.0}
    assert metric.compute({"shuffled": shuffled}) == pytest.approx(
        {
            "iou_accuracy": 2 / 5, "iou": sum(overlaps) / 5, "readable": 4 / 5, "iou_accuracy/count": 5,
            "chance": 0.25, "floor/shuffled": 0.3, "normalised": 0.1 / 0.7,
        }
    )  # fmt: skip
    assert [metric.score(row(text, RIGHT)) for text in said] == [1, 1, 0, 0, 0]
    assert BoxAccuracy(threshold=0.6).score(row(said[1], RIGHT)) == 0
    assert BoxAccuracy().score(row(RIGHT, "<box>(600,600),(900,900)</box>", RIGHT)) == 1  # any of several


def test_another_convention_than_that_of_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="same convention"):
        BoxAccuracy("shikra").update(row(RIGHT, RIGHT))
    with pytest.raises(UserError, match="threshold is 2"):
        BoxAccuracy(threshold=2)
    with pytest.raises(UserError, match="no question"):
        BoxAccuracy().predicted()


def test_forms() -> None:
    text = box_text("qwen_vl")
    told = {
        RIGHT: (True, 0),
        f"<ref>a circle</ref>{RIGHT}": (True, 1),
        "row one column two": (False, 1),
        "a circle.": (False, 2),
        "It has 1.5 rows. So it is left.": (False, 3),
        "": (False, 0),
    }
    assert {said: form(said, text) for said in told} == told


def test_the_share_of_answers_in_the_form_that_was_asked_for() -> None:
    metric = AnswerForm()
    metric.update(row("<box>(1,1),(2,2)</box>", RIGHT))
    metric.update(row("row one", RIGHT))
    metric.update(row("row two", "row one", kind="place"))
    assert metric.compute() == pytest.approx(
        {"answer_form": 2 / 3, "answer_form/kind/refer": 1 / 2, "answer_form/kind/place": 1, "answer_form/count": 3}
    )
    with pytest.raises(UserError, match="has no answer"):
        metric.update(row("x"))

"""Accuracy over options, against a loop over the definition."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.evaluate.metrics.options import OptionAccuracy, chosen
from vlmlab.evaluate.metrics.rows import Row, read_rows, write_rows
from vlmlab.evaluate.metrics.scoring import predictions_file, score_predictions

LETTERS = ("A", "B", "C")


def row(right: str, options: tuple[str, ...], logs: tuple[float, ...] = (), said: str = "", **more: object) -> Row:
    return Row("b", more.pop("id", "1"), 0, "k", "?", said, (right,), options=options, log_likelihoods=logs, **more)  # type: ignore[arg-type]


def scored(rows: list[Row]) -> dict[str, float]:
    metric = OptionAccuracy()
    for one in rows:
        metric.update(one)
    return metric.compute()


def test_sum_and_length_against_a_loop() -> None:
    draw = random.Random(0)
    rows, acc, norm, chance = [], 0, 0, 0.0
    for _ in range(200):
        options = tuple("x" * draw.randint(1, 9) + str(k) for k in range(draw.randint(2, 5)))
        logs = tuple(-draw.random() * 9 for _ in options)
        right = draw.choice(options)
        rows.append(row(right, options, logs))
        best = best_norm = 0
        for k in range(len(options)):
            best = k if logs[k] > logs[best] else best
            best_norm = k if logs[k] / len(options[k]) > logs[best_norm] / len(options[best_norm]) else best_norm
        acc, norm = acc + (options[best] == right), norm + (options[best_norm] == right)
        chance += 1 / len(options)
    got = scored(rows)
    assert got["option_accuracy"] == got["option_accuracy/kind/k"] == pytest.approx(acc / 200)
    assert got["option_accuracy_norm"] == pytest.approx(norm / 200) and acc != norm
    assert got["chance"] == got["floor/chance"] == pytest.approx(chance / 200) and got["option_accuracy/count"] == 200
    assert got["normalised"] == pytest.approx((acc / 200 - chance / 200) / (1 - chance / 200))


@pytest.mark.parametrize(
    ("said", "option"),
    [("B", "B"), ("b.", "B"), ("(A)", "A"), (" a\n", "A"), ("", ""), ("D", ""), ("A or B", ""), ("the", "")],
)
def test_an_answer_in_words_names_an_option(said: str, option: str) -> None:
    """The letter A is an option like the others, and no article."""
    assert chosen(row("A", LETTERS, said=said)) == option


def test_groups_and_stated_chance() -> None:
    rows = [row("A", LETTERS, said="A", group="g", chance=0.5), row("B", LETTERS, said="A", chance=0.1)]
    got = scored(rows)
    assert got["option_accuracy/g"] == 1 and got["option_accuracy"] == 0.5 and got["chance"] == pytest.approx(0.3)
    assert "option_accuracy_norm/g" in got


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UserError, match=r"Question 1 of b has no options"):
        scored([row("A", ())])
    with pytest.raises(UserError, match=r"The answer of question 1 of b is none of its options"):
        scored([row("D", LETTERS)])
    with pytest.raises(UserError, match="no question to score"):
        OptionAccuracy().predicted()
    with pytest.raises(DataError, match="b 1: an option's likelihood is not a number"):
        row("A", LETTERS, (0.0, float("nan"), 0.0)).to_json()


def test_rows_keep_them_and_are_scored_again(tmp_path: Path) -> None:
    logs = {"": (-1 / 3, -2.0, -0.1), "shuffled": (-0.5, -0.25, -0.75)}
    for baseline, values in logs.items():
        rows = [row("C", LETTERS, values, "C")]
        write_rows(predictions_file(tmp_path, "b", baseline), rows)
        assert read_rows(predictions_file(tmp_path, "b", baseline)) == rows
    got = score_predictions(tmp_path, "b", [OptionAccuracy])
    assert got["b/option_accuracy"] == 1 and got["b/option_accuracy/shuffled"] == 0
    assert "options" not in Row("b", "1", 0, "", "?", "x", ("x",)).to_json()
    line = row("C", LETTERS, (0.0, 1.0, 2.0)).to_json().replace("[0.0, 1.0, 2.0]", "[0.0, 1.0]")
    with pytest.raises(DataError, match="this line: key 'log_likelihoods' must have a number for each option"):
        Row.from_json(line)

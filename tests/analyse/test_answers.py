"""Intervals over the questions of one run, from its prediction files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vlmlab.analyse.answers import aligned, intervals_over_questions, scored
from vlmlab.analyse.questions import over_questions
from vlmlab.analyse.results import MetricKey
from vlmlab.analyse.table import benchmark_tables, final_table

RIGHT = [i % 3 != 0 for i in range(40)]


@pytest.fixture
def run(tmp_path: Path, cells: ModuleType) -> Path:
    """A run with 40 answers, two an image, 26 of them right."""
    folder: Path = cells.write_cell(tmp_path, "seed=0", result=cells.result(0.65))
    cells.write_answers(folder, RIGHT)
    return folder


def test_intervals_are_of_the_questions_a_score_is_about(run: Path, cells: ModuleType) -> None:
    found = intervals_over_questions(run, cells.metrics(0.65))
    assert set(found) == {"quiz/vqa_accuracy", "quiz/vqa_accuracy/kind/count", "quiz/vqa_accuracy/new"}
    whole = found["quiz/vqa_accuracy"]
    assert whole == over_questions(np.array(RIGHT, float), np.arange(40) // 2)
    assert (whole.n, whole.mean) == (40, pytest.approx(26 / 40))
    assert (found["quiz/vqa_accuracy/kind/count"].n, found["quiz/vqa_accuracy/new"].n) == (20, 6)


def test_the_final_table_has_them(run: Path, cells: ModuleType) -> None:
    metrics = cells.metrics(0.65)
    quiz, tales = benchmark_tables(metrics, intervals_over_questions(run, metrics))
    assert quiz.columns[:3] == ("score", "value", "95 % interval") and "95 % interval" not in tales.columns
    whole = over_questions(np.array(RIGHT, float), np.arange(40) // 2)
    assert dict(quiz.rows)["vqa_accuracy"][:2] == (0.65, f"{whole.low:.3f}-{whole.high:.3f}")
    text = final_table(cells.result(0.65), run)
    assert f"{whole.low:.3f}-{whole.high:.3f}" in text and "describes this one trained model" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "95 %" not in final_table(cells.result(0.65))


def test_what_cannot_be_read_has_no_interval(run: Path, cells: ModuleType) -> None:
    (run / "predictions" / "quiz.jsonl").write_text("{broken\n")
    assert intervals_over_questions(run, cells.metrics(0.65)) == {}
    (run / "config.yaml").write_text("a: [")
    assert intervals_over_questions(run, cells.metrics(0.65)) == {}
    assert final_table(cells.result(0.65), run) == final_table(cells.result(0.65))


def test_runs_are_aligned_by_their_common_questions(run: Path, tmp_path: Path, cells: ModuleType) -> None:
    other: Path = cells.write_cell(tmp_path, "seed=1", result=cells.result(0.5))
    cells.write_answers(other, [True] * 30)
    runs = [found for folder in (run, other) if (found := scored(folder, "quiz")) is not None]
    scores, images = aligned(runs, MetricKey.parse("quiz/vqa_accuracy"))
    assert scores.tolist() == [[float(right) for right in RIGHT[:30]], [1.0] * 30]
    assert images.tolist() == [i // 2 for i in range(30)]
    assert scored(run, "tales") is None and runs[0].questions(MetricKey.parse("quiz/chance")) == []

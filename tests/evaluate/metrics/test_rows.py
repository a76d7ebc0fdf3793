"""Prediction files: written, read back, scored; broken lines are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlmlab.contracts.errors import DataError
from vlmlab.evaluate.metrics.captions import CaptionScores
from vlmlab.evaluate.metrics.rows import Row, read_rows, write_rows
from vlmlab.evaluate.metrics.scoring import predictions_file, score_predictions
from vlmlab.evaluate.metrics.vqa import VqaAccuracy

ROW = Row("b", "s-1", 0, "count", "How\nmany?", 'say "zwölf"', ("12", "twelve"), 0.25, ("img-1", "img-2"))


def test_round_trip(tmp_path: Path) -> None:
    rows = [ROW, Row("b", "s-2", 1, "", "p", "", ("x",), group="held_out_pair")]
    write_rows(tmp_path / "predictions" / "b.jsonl", rows)
    assert read_rows(tmp_path / "predictions" / "b.jsonl") == rows
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        (ROW.to_json().replace('"turn": 0', '"turn": "0"'), "line 2: key 'turn' must be a number"),
        (ROW.to_json().replace('"kind": "count", ', ""), "line 2: key 'kind' must be text but is None"),
        (ROW.to_json().replace('["12", "twelve"]', '"12"'), "line 2: key 'references' must be a list of texts"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(ROW.to_json() + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        read_rows(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "b.jsonl")


def _write(folder: Path, baseline: str, *predictions: str) -> None:
    rows = [
        Row("b", str(number), 0, "colour", "?", prediction, ("red",), 0.25)
        for number, prediction in enumerate(predictions)
    ]
    write_rows(predictions_file(folder, "b", baseline), rows)


def test_scores_with_baselines(tmp_path: Path) -> None:
    _write(tmp_path, "", "red", "red", "red", "blue")
    _write(tmp_path, "shuffled", "red", "blue", "blue", "blue")
    assert score_predictions(tmp_path, "b", [VqaAccuracy]) == pytest.approx(
        {
            "b/vqa_accuracy": 0.75,
            "b/vqa_accuracy/count": 4,
            "b/vqa_accuracy/shuffled": 0.25,
            "b/vqa_accuracy/kind/colour": 0.75,
            "b/vqa_accuracy/kind/colour/shuffled": 0.25,
            "b/chance": 0.25,
            "b/chance/kind/colour": 0.25,
            "b/floor/chance": 0.25,
            "b/floor/chance/kind/colour": 0.25,
            "b/normalised": 2 / 3,
            "b/normalised/kind/colour": 2 / 3,
        }
    )
    assert "b/vqa_accuracy/shuffled" not in score_predictions(tmp_path, "b", [VqaAccuracy], baselines=())
    _write(tmp_path, "lookup", "red", "red", "blue", "blue")
    scores = score_predictions(tmp_path, "b", [VqaAccuracy])
    assert (scores["b/vqa_accuracy/lookup"], scores["b/vqa_accuracy/kind/colour/lookup"]) == (0.5, 0.5)
    assert (scores["b/floor/lookup"], scores["b/normalised"]) == (0.5, 0.5) and "b/floor/chance" not in scores
    with pytest.raises(DataError, match="other"):
        score_predictions(tmp_path, "other", [VqaAccuracy, CaptionScores])


def test_importing_metrics_does_not_import_torch() -> None:
    modules = "captions, vqa, scoring, rows"
    code = f"import sys; from vlmlab.evaluate.metrics import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Scores from the answers that a run keeps: its own metrics, others, and what cannot be scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.score import compared
from vlmlab.contracts.errors import DataError, UserError
from vlmlab.evaluate.metrics.rows import Row, write_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.evaluate.rescore import rescored

VQA, F1 = "vlmlab.evaluate.metrics.vqa.VqaAccuracy", "vlmlab.evaluate.metrics.token_f1.TokenF1"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, DictConfig]:
    """Two benchmarks of two questions; the first has been asked with wrong images, too."""
    said = {("a", ""): ["red cat", "no"], ("a", "shuffled"): ["dog", "no"], ("b", ""): ["cat", "yes"]}
    for (name, baseline), answers in said.items():
        rows = [Row(name, str(k), 0, "", "?", text, ("cat", "no")[k : k + 1]) for k, text in enumerate(answers)]
        file = predictions_file(tmp_path, name, baseline)
        file.parent.mkdir(exist_ok=True)
        write_rows(file, rows)
    benchmarks = {name: {"metrics": [{"_target_": VQA}]} for name in "ab"}
    return tmp_path, OmegaConf.create({"data": {"benchmarks": benchmarks}})


def test_by_its_own_metrics(run: tuple[Path, DictConfig]) -> None:
    got = rescored(*run, benchmarks=None, metrics=None, trust=False)
    assert {k: v for k, v in got.items() if k.split("/")[1] == "vqa_accuracy"} == {
        "a/vqa_accuracy": 0.5, "a/vqa_accuracy/count": 2, "a/vqa_accuracy/shuffled": 0.5,
        "b/vqa_accuracy": 0.5, "b/vqa_accuracy/count": 2,
    }  # fmt: skip
    assert compared(got, got) == f"{len(got)} scores, all as in result.json"
    assert compared(got, {}) == "none of these scores is in result.json"
    assert compared(got, {"a/vqa_accuracy": 0.25}) == (
        f"1 of 1 scores are not those of result.json; {len(got) - 1} are not in it: a/vqa_accuracy 0.25 and now 0.5"
    )


def test_by_another(run: tuple[Path, DictConfig]) -> None:
    got = rescored(*run, benchmarks=["a"], metrics=[F1], trust=False)
    assert got == {"a/token_f1": (2 / 3 + 1) / 2, "a/token_f1/count": 2, "a/token_f1/shuffled": 0.5}


def test_what_cannot_be_scored(run: tuple[Path, DictConfig]) -> None:
    with pytest.raises(UserError, match=r"benchmarks has c, which .* did not answer; choose some of a, b"):
        rescored(*run, benchmarks=["c"], metrics=None, trust=False)
    with pytest.raises(UserError, match=r"metrics has os\.system, which is from outside vlmlab"):
        rescored(*run, benchmarks=None, metrics=["os.system"], trust=False)
    for name in ("vlmlab.evaluate.metrics.rows.Row", "vlmlab.contracts.errors.UserError", "vlmlab.nowhere.X"):
        with pytest.raises(UserError, match=f"metrics has {name}, which is (not a metric|from outside)"):
            rescored(*run, benchmarks=None, metrics=[name], trust=False)
    predictions_file(run[0], "b").unlink()
    with pytest.raises(DataError):
        rescored(*run, benchmarks=None, metrics=None, trust=False)

"""Compositions against one declared baseline: numbers, sentences, files and refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vlmlab.analyse.combination import Combination, combinations
from vlmlab.analyse.compare import chosen_row, compare, races
from vlmlab.analyse.compare_report import write_comparison
from vlmlab.analyse.questions import over_both
from vlmlab.analyse.results import read_sweep
from vlmlab.analyse.steps import Threshold
from vlmlab.contracts.errors import UserError

METRIC = "quiz/vqa_accuracy"
SHIFTS = {("mlp", "bidir"): 0.6, ("mlp", "causal"): 0.3, ("qformer", "bidir"): 0.6}
SEEDS, QUESTIONS = 8, 60


def answers(shift: float, seed: int) -> list[bool]:
    rng = np.random.default_rng([seed, 1])
    return [bool(value) for value in rng.random(QUESTIONS) < shift]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, cells: ModuleType) -> Path:
    """Two compositions that are right as often, and one that is right less often; steps until they look."""
    tmp_path: Path = tmp_path_factory.mktemp("sweep")
    for (connector, mask), shift in SHIFTS.items():
        for seed in range(SEEDS):
            right = answers(shift, seed + 100 * (connector == "qformer"))
            overrides = (f"connector={connector}", f"mask={mask}", f"seed={seed}")
            folder = cells.write_cell(tmp_path, *overrides, result=cells.result(sum(right) / QUESTIONS))
            cells.write_answers(folder, right)
            looks = [{"stage": "a", "step": step, "held_out/loss": 1 - shift * step / 100} for step in (0, 50, 100)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looks))
    return tmp_path


def row(rows: list[Combination], label: str) -> Combination:
    return next(row for row in rows if row.label == label)


def test_differences(sweep: Path) -> None:
    rows = combinations(read_sweep(sweep))
    base = chosen_row(rows, "mlp,bidir")
    causal, qformer = compare(rows, base, METRIC)
    assert (causal.row.label, qformer.row.label) == ("mlp, causal", "qformer, bidir")
    scores = {shift: np.array([answers(shift, seed) for seed in range(SEEDS)], float) for shift in (0.6, 0.3)}
    difference = scores[0.3] - scores[0.6]
    assert causal.difference is not None and causal.difference.mean == pytest.approx(difference.mean())
    assert causal.both == over_both(difference, np.arange(QUESTIONS) // 2)
    assert (causal.questions, causal.images) == (QUESTIONS, QUESTIONS // 2)
    assert (causal.p_value, causal.adjusted, causal.verdict) == (2 / 256, 4 / 256, "lower")
    assert qformer.verdict == "not distinguishable"
    assert causal.sentence("mlp, bidir") == (
        f"mlp, causal against mlp, bidir: lower: {difference.mean():.3f}, interval {causal.difference.ends} (for other "
        f"questions too: {causal.both.ends}), n = 8, p = 0.016"
    )


def test_the_other_way_round(sweep: Path) -> None:
    rows = combinations(read_sweep(sweep))
    forth = compare(rows, row(rows, "mlp, bidir"), METRIC)[0].difference
    back = next(one for one in compare(rows, row(rows, "mlp, causal"), METRIC) if one.row.label == "mlp, bidir")
    assert forth is not None and back.difference is not None
    assert (back.difference.mean, back.verdict) == (pytest.approx(-forth.mean), "higher")


def test_without_predictions_there_are_seeds_only(sweep: Path) -> None:
    rows = combinations(read_sweep(sweep))
    one = compare(rows, rows[0], "tales/cider_d")[0]
    assert one.both is None and one.difference is not None and one.difference.n == SEEDS
    one = compare(rows, rows[0], METRIC, single_answers=False)[0]
    assert one.both is None and one.adjusted is not None


def test_report_and_files(sweep: Path) -> None:
    text = write_comparison(sweep, "connector=mlp,mask=bidir")
    assert "quiz/vqa_accuracy against the baseline mlp, bidir, paired by seed" in text
    assert "mlp, causal against mlp, bidir: lower: -0." in text
    assert "qformer, bidir against mlp, bidir: not distinguishable:" in text
    assert "on this one test set" in text and "(60 about 30 images were asked)" in text
    assert "where the variance of one answer's score comes from" in text
    path = sweep / "difference_quiz-vqa_accuracy_to_mlp-bidir.csv"
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["connector"], first["mask"], first["baseline"], first["n"]) == ("mlp", "causal", "mlp, bidir", "8")
    assert float(first["difference/low"]) < float(first["difference"]) < float(first["difference/high"]) < 0
    assert (float(first["p"]), float(first["p_holm"]), first["verdict"]) == (2 / 256, 4 / 256, "lower")
    assert second["verdict"] == "not distinguishable" and float(second["both/high"]) > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_common_seed_has_no_interval_and_says_why(tmp_path: Path, cells: ModuleType) -> None:
    for mask, score in (("bidir", 0.5), ("causal", 0.4)):
        cells.write_cell(tmp_path, f"mask={mask}", "seed=0", result=cells.result(score))
    text = write_comparison(tmp_path, "bidir")
    assert "No intervals: there is no second seed in common." in text and "has no predictions" not in text


def test_report_at_eighty_columns(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = write_comparison(sweep, "mlp,bidir").replace(str(sweep), "sweep")
    lines = [line for line in text.splitlines() if not line.startswith("sweep/")]
    assert [line for line in lines if len(line) > 80] == []


def test_steps_to_a_threshold(sweep: Path) -> None:
    rows = combinations(read_sweep(sweep))
    base, causal, qformer = races(rows, rows[0], Threshold.parse("held_out/loss<0.45"))
    assert (base.passed, base.median, base.p_value) == (8, "100", None)
    assert (causal.passed, causal.median) == (0, ">100") and causal.adjusted is not None and causal.adjusted < 0.001
    assert qformer.p_value == qformer.adjusted == 1.0
    text = write_comparison(sweep, "mlp,bidir", until="held_out/loss<0.45")
    assert "steps until held_out/loss<0.45" in text and "0 of 8" in text
    with (sweep / "steps_held_out-loss-0.45_to_mlp-bidir.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 24 and {line["passed"] for line in found if line["mask"] == "causal"} == {"0"}


@pytest.mark.parametrize(
    ("baseline", "label"),
    [("mask=causal", "mlp, causal"), ("qformer", "qformer, bidir"), ("bidir, mlp", "mlp, bidir")],
)
def test_a_baseline_is_named_by_what_tells_it_apart(sweep: Path, baseline: str, label: str) -> None:
    assert chosen_row(combinations(read_sweep(sweep)), baseline).label == label


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"baseline": "mlp"}, "baseline=mlp names 2 rows of the sweep; give one of: mlp, bidir | mlp, causal | qfo"),
        ({"baseline": "connector=perceiver"}, "names no row of the sweep"),
        ({"baseline": ""}, "names no row"),
        ({"baseline": "qformer", "metric": "quiz/f1"}, "has metric=quiz/f1; it has quiz/chance"),
        ({"baseline": "qformer", "until": "loss"}, "until=loss is not a threshold"),
        ({"baseline": "qformer", "until": "loss<1"}, "has loss in its metrics.jsonl; train with evaluation.every"),
    ],
)
def test_refusals(sweep: Path, arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        write_comparison(sweep, **arguments)
    assert sentence in str(refused.value) and len(str(refused.value)) <= 300


def test_nothing_to_compare(tmp_path: Path, cells: ModuleType) -> None:
    with pytest.raises(UserError, match="has no finished cell"):
        write_comparison(tmp_path, "mlp")
    cells.write_cell(tmp_path, "mask=bidir", "seed=0", result=cells.result(0.5))
    cells.write_cell(tmp_path, "mask=bidir", "seed=1", result=cells.result(0.5))
    with pytest.raises(UserError, match="names no row"):
        write_comparison(tmp_path, "bidir")

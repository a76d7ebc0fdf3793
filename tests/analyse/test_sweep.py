"""The table of a sweep: it always comes and says what is missing."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest

from vlmlab.analyse import figure
from vlmlab.analyse.combination import combinations, short_names, swept_keys
from vlmlab.analyse.results import read_sweep
from vlmlab.analyse.sweep import main_metrics, write_table


@pytest.fixture
def sweep(tmp_path: Path, cells: ModuleType) -> Path:
    """mlp finished with two seeds, qformer with one of two, linear nowhere."""
    for seed, accuracy in ((0, 0.8), (1, 0.9)):
        cells.write_cell(
            tmp_path, "connector=mlp", f"seed={seed}", "budget=short", result=cells.result(accuracy, accuracy)
        )
    cells.write_cell(tmp_path, "connector=qformer", "seed=0", "budget=short", result=cells.result(0.7, 0.6))
    cells.write_cell(
        tmp_path, "connector=qformer", "seed=1", "budget=short",
        state={"state": "failed", "error": "UserError: the loss is not finite"}, log="",
    )  # fmt: skip
    cells.write_cell(tmp_path, "connector=linear", "seed=0", "budget=short", result='{"form')
    return tmp_path


def _row(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(start + " ")).split()


def test_text(sweep: Path) -> None:
    text = write_table(sweep)
    half = 12.7062 * 0.0707107 / 2**0.5
    assert max(map(len, text.splitlines())) <= max(120, len(str(sweep)) * 2 + 40)
    assert "5 cells: 3 done, 2 failed" in text
    assert "everywhere: budget=short" in text
    plus = "\N{PLUS-MINUS SIGN}"
    assert _row(text, "mlp")[:8] == ["mlp", "2", "done", "0.850", plus, f"{half:.3f}", "0.300", "0.400"]
    assert _row(text, "qformer")[:8] == ["qformer", "1", "1", "done,", "1", "failed", "0.700", "0.300"]
    assert _row(text, "linear")[:5] == ["linear", "0", "1", "failed", "-"]
    assert "failed: connector=qformer seed=1 budget=short: UserError: the loss is not finite" in text
    assert "failed: connector=linear seed=0 budget=short: result.json cannot be read" in text
    assert "1.5M" in text and "visual_tokens" in text


def test_csv(sweep: Path) -> None:
    write_table(sweep)
    with (sweep / "table.csv").open(newline="") as file:
        rows = {row["connector"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["linear", "mlp", "qformer"]
    mlp = rows["mlp"]
    assert (mlp["n"], mlp["state"], mlp["reason"], mlp["stale"]) == ("2", "done", "", "0")
    assert float(mlp["quiz/vqa_accuracy"]) == pytest.approx(0.85)
    assert float(mlp["quiz/vqa_accuracy/low"]) == pytest.approx(0.85 - 12.7062 * 0.05, abs=1e-4)
    assert float(mlp["quiz/vqa_accuracy/kind/count"]) == pytest.approx(0.75)
    assert float(mlp["cost/params"]) == 1_500_000
    assert rows["qformer"]["quiz/vqa_accuracy/low"] == ""
    assert rows["qformer"]["reason"] == "UserError: the loss is not finite"
    assert (rows["linear"]["n"], rows["linear"]["quiz/vqa_accuracy"]) == ("0", "")
    assert "budget" not in mlp and "seed" not in mlp


def test_figure(sweep: Path) -> None:
    text = write_table(sweep)
    assert text.endswith("figure.png")
    assert (sweep / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_fails_is_a_line(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(figure, "draw", broken)
    assert "(no figure: RuntimeError: no fonts)" in write_table(sweep)
    assert (sweep / "table.csv").exists()


def test_nothing_finished(tmp_path: Path, cells: ModuleType) -> None:
    cells.write_cell(tmp_path, "connector=mlp", state={"state": "failed", "error": "out of memory"})
    cells.write_cell(tmp_path, "connector=linear")
    text = write_table(tmp_path)
    assert "failed: connector=mlp: out of memory" in text
    assert "not started: connector=linear" in text
    assert "(no figure: nothing to draw)" in text
    assert (tmp_path / "table.csv").read_text().startswith("connector,n,state,reason,stale\n")


def test_no_cell_at_all(tmp_path: Path) -> None:
    assert write_table(tmp_path) == f"{tmp_path} holds no cell"


def test_one_combination_only(tmp_path: Path, cells: ModuleType) -> None:
    for seed in range(3):
        cells.write_cell(tmp_path, f"seed={seed}", result=cells.result(0.5 + seed / 10))
    text = write_table(tmp_path)
    assert _row(text, "all")[:4] == ["all", "3", "done", "0.600"]


def test_cells_without_any_overrides_still_have_a_row(tmp_path: Path, cells: ModuleType) -> None:
    folder = cells.write_cell(tmp_path, "connector=mlp", state={"state": "failed", "error": "x"})
    cells.write_cell(tmp_path, "connector=linear", result=cells.result(0.5))
    (folder / "overrides.json").unlink()
    text = write_table(tmp_path)
    assert _row(text, "-")[:4] == ["-", "0", "1", "failed"]
    assert "failed: connector-mlp: x" in text


def test_stale_results_are_marked(tmp_path: Path, cells: ModuleType) -> None:
    cells.write_cell(tmp_path, "connector=mlp", result=cells.result(0.5), env={"codes": ["other"]})
    cells.write_cell(tmp_path, "connector=linear", result=cells.result(0.5))
    text = write_table(tmp_path)
    assert _row(text, "mlp")[2] == "done*"
    assert _row(text, "linear")[2] == "done"
    assert "made by other code" in text


def test_order_and_keys(tmp_path: Path, cells: ModuleType) -> None:
    for rate in ("1e-3", "3e-4", "0.01", "off"):
        cells.write_cell(tmp_path, f"recipe.stages.align.lr={rate}", "seed=0", "mask=bidir")
    records = read_sweep(tmp_path)
    assert swept_keys(records) == ["recipe.stages.align.lr"]
    values = [row.values["recipe.stages.align.lr"] for row in combinations(records)]
    assert values == ["3e-4", "1e-3", "0.01", "off"]


def test_short_names() -> None:
    keys = ["connector", "a.train.connector", "stages.align.steps", "stages.dense.steps", "mask.width"]
    assert short_names(keys) == ["connector", "train.connector", "align.steps", "dense.steps", "width"]


def test_main_metrics_are_common_and_telling_ones_first(tmp_path: Path, cells: ModuleType) -> None:
    more = cells.result(0.5)
    more["metrics"] = {"tales/bleu_4": 0.2, "tales/bleu_4/shuffled": 0.1, "only/here": 1.0} | more["metrics"]
    less = cells.result(0.5)
    less["metrics"] |= {"tales/bleu_4": 0.2, "tales/bleu_4/shuffled": 0.1}
    cells.write_cell(tmp_path, "seed=0", result=more)
    cells.write_cell(tmp_path, "seed=1", result=less)
    assert main_metrics(read_sweep(tmp_path)) == ["quiz/vqa_accuracy", "tales/cider_d", "tales/bleu_4"]


def test_metrics_without_baselines_are_shown_too(tmp_path: Path, cells: ModuleType) -> None:
    cells.write_cell(tmp_path, "seed=0", result={"metrics": {"v/loss": 1.5, "v/count": 3, "v/chance": 0.1}})
    assert main_metrics(read_sweep(tmp_path)) == ["v/loss"]


def test_differences_are_paired_by_seed(tmp_path: Path, cells: ModuleType) -> None:
    for seed in range(8):
        cells.write_cell(tmp_path, "mask=bidir", f"seed={seed}", result=cells.result(0.5 + 0.03 * seed))
        accuracy = 0.4 + 0.03 * seed + 0.001 * (seed % 3)
        cells.write_cell(tmp_path, "mask=causal", f"seed={seed}", result=cells.result(accuracy))
    text = write_table(tmp_path)
    assert "quiz/vqa_accuracy, difference to bidir, paired by seed" in text
    row = next(line for line in text.splitlines() if line.startswith("causal") and "lower" in line)
    assert row.split()[1] == "-0.099" and row.split()[-2:] == ["0.0078", "lower"]
    assert f"vlmlab compare {tmp_path} baseline=... metric=..." in text and "nothing can" not in text


def test_too_few_seeds_are_said_to_be(tmp_path: Path, cells: ModuleType) -> None:
    for seed in range(3):
        for mask, accuracy in (("bidir", 0.9), ("causal", 0.1)):
            cells.write_cell(tmp_path, f"mask={mask}", f"seed={seed}", result=cells.result(accuracy + seed / 1000))
    text = write_table(tmp_path)
    assert "note: with 3 seeds and 1 comparison nothing can be significant at 0.05" in text
    assert next(line for line in text.splitlines() if "not distinguishable" in line).startswith("causal")


def test_headings_are_whole_at_eighty_columns(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = write_table(sweep).replace(str(sweep), "sweep")
    assert max(map(len, text.splitlines())) <= 80
    for heading in ("connector", "state", "vqa_accuracy", "shuffled", "lookup", "chance", "cider_d", "visual_tokens"):
        assert heading in text


def test_markdown(sweep: Path) -> None:
    write_table(sweep)
    head, rule, *rows = (sweep / "table.md").read_text().splitlines()
    assert head.startswith("| connector | n | state | quiz vqa_accuracy | shuffled | lookup | chance |")
    assert set(rule) == {"|", "-"} and len(rows) == 3
    half = 12.7062 * 0.0707107 / 2**0.5
    assert rows[1].startswith(f"| mlp | 2 | done | 0.850 \N{PLUS-MINUS SIGN} {half:.3f} | 0.300 |")


def test_held_out_losses_stand_after_the_scores(tmp_path: Path, cells: ModuleType) -> None:
    result = cells.result(0.5)
    result["metrics"] = {"val/short/loss": 1.25, "val/short/loss/shuffled": 2.5} | result["metrics"]
    cells.write_cell(tmp_path, "seed=0", result=result)
    assert main_metrics(read_sweep(tmp_path)) == ["quiz/vqa_accuracy", "tales/cider_d", "val/short/loss"]
    assert "short/loss" in write_table(tmp_path)

"""Runs from a sweep's folder, a record and an export of W&B's runs are the same comparison."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vlmlab.analyse.combination import Combination, combinations
from vlmlab.analyse.compare import row_band
from vlmlab.analyse.read import read_results, reader_of
from vlmlab.contracts.errors import UserError
from vlmlab.runs.cells_csv import CellsCsv
from vlmlab.runs.folder import RunFolder

METRIC = "quiz/vqa_accuracy"
CELLS = [(connector, seed) for connector in ("mlp", "qformer") for seed in range(3)]


def score(connector: str, seed: int) -> float:
    return 0.5 + 0.1 * (connector == "mlp") + 0.01 * seed


def config(connector: str, seed: int) -> dict:
    name = {"mlp": "MlpConnector", "qformer": "QFormerConnector"}[connector]
    own = {
        "_target_": f"vlmlab.connector.{connector}.{name}",
        **({"depth": 2} if connector == "mlp" else {"queries": 16}),
    }
    return {"seed": seed, "name": "x", "connector": own, "recipe": {"stages": {"one": {"connector": name}}}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for connector, seed in CELLS:
        with RunFolder(tmp_path / "sweep" / f"connector-{connector}_seed-{seed}") as run:
            run.open(config(connector, seed), [f"connector={connector}", f"seed={seed}"])
            for step in (0, 10):
                run.log({"stage": "one", "step": step, "held_out/loss": 2.0 - 0.1 * step + 0.01 * seed})
            run.finish({METRIC: score(connector, seed)}, {"seconds": 5.0})
    CellsCsv(tmp_path / "cells.csv").add(sorted((tmp_path / "sweep").iterdir()))
    return tmp_path / "sweep"


def export(path: Path, nested: bool) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["summary", "config", "name"] if nested else ["Name", "State", "seed", "connector._target_", METRIC]
        )
        for connector, seed in CELLS:
            summary = {METRIC: score(connector, seed), "train/loss": 1.0, "_step": 3}
            whole = config(connector, seed)
            if nested:
                shown = str(whole) if seed else json.dumps(whole)
                writer.writerow([json.dumps(summary), shown, f"{connector}{seed}"])
            else:
                writer.writerow(
                    [f"{connector}{seed}", "finished", seed, whole["connector"]["_target_"], summary[METRIC]]
                )
    return path


def by_row(path: Path) -> dict[str, Combination]:
    return {row.label: row for row in combinations(read_results(path))}


def test_folder_and_record_are_the_same(sweep: Path) -> None:
    folder, record = by_row(sweep), by_row(sweep.parent / "cells.csv")
    assert list(folder) == list(record) == ["mlp", "qformer"]
    for label, row in folder.items():
        assert row.by_seed(METRIC) == record[label].by_seed(METRIC)
        bands = [
            row_band(one, "held_out/loss", reader_of(path))
            for one, path in ((row, sweep), (record[label], sweep.parent / "cells.csv"))
        ]
        assert [step for step, _ in bands[0]] == [0.0, 10.0]
        assert [value.mean for _, value in bands[0]] == pytest.approx([value.mean for _, value in bands[1]])


@pytest.mark.parametrize("nested", [True, False])
def test_an_export_has_the_keys_that_tell_its_runs_apart(tmp_path: Path, nested: bool) -> None:
    path = export(tmp_path / "runs.csv", nested)
    rows = by_row(path)
    assert list(rows) == ["MlpConnector", "QFormerConnector"]
    assert list(rows["MlpConnector"].values) == ["connector._target_"]
    assert rows["MlpConnector"].by_seed(METRIC) == {str(seed): score("mlp", seed) for seed in range(3)}
    assert set(rows["MlpConnector"].records[0].metrics) == {METRIC}
    assert row_band(rows["MlpConnector"], "held_out/loss", reader_of(path)) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not there"),
        ("a,b\n1,2\n", "no column name"),
        ("name,config,summary\nx,1,{}\n", "config of a run is not a map"),
    ],
)
def test_what_is_none_of_them_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_results(path)

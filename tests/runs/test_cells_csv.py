from __future__ import annotations

from pathlib import Path

import pytest

from vlmlab.analyse.steps import Passage, Threshold, passage
from vlmlab.contracts.errors import UserError
from vlmlab.runs.cells_csv import OTHER_CODE, RECORDED, CellsCsv, cost_of, metrics_of, overrides_of, read_cells
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.looks_csv import read_looks

CONFIG = {"seed": 0, "mask": {"kind": "bidir"}, "recipe": {"stages": {"a": {"steps": 2}}}}
METRICS = {"b/vqa_accuracy": 1 / 3, "b/cider_d": 2.0}
WORDS = ["mask=bidir", "data.path='a, b.json'"]


def finished(path: Path, config: dict = CONFIG) -> Path:
    with RunFolder(path) as run:
        run.open(config, WORDS)
        run.finish(METRICS, {"seconds": 1.5})
    return path


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "experiments" / "new" / "cells.csv"  # of folders that are not there yet
    CellsCsv(path).add([finished(tmp_path / "cell")])
    return path


def test_a_row_has_every_digit(record: Path) -> None:
    (row,) = read_cells(record)
    assert row["cell"] == "cell" and overrides_of(row) == WORDS
    assert metrics_of(row) == METRICS and cost_of(row) == {"seconds": 1.5}


def test_a_restored_cell_is_as_it_was(record: Path, tmp_path: Path) -> None:
    new = tmp_path / "elsewhere" / "cell"
    assert CellsCsv(record).restore(new, CONFIG, WORDS) == RECORDED
    result = RunFolder(new).result() or {}
    old = RunFolder(tmp_path / "cell").result() or {}
    assert result == old | {"recorded": str(record)} and not RunFolder(new).by_other_code()
    text = record.read_text()
    CellsCsv(record).add([new])
    assert record.read_text() == text


def test_a_cell_of_other_code_says_so(record: Path, tmp_path: Path) -> None:
    (row,) = read_cells(record)
    record.write_text(record.read_text().replace(row["code"], "0" * 16))
    assert CellsCsv(record).restore(tmp_path / "new", CONFIG, WORDS) == OTHER_CODE
    assert RunFolder(tmp_path / "new").by_other_code()


def test_another_configuration_other_data_and_a_begun_cell_are_not_restored(record: Path, tmp_path: Path) -> None:
    assert CellsCsv(record).restore(tmp_path / "new", {**CONFIG, "seed": 1}, WORDS) == ""
    with RunFolder(tmp_path / "begun") as run:
        run.open(CONFIG, WORDS)
    assert CellsCsv(record).restore(tmp_path / "begun", CONFIG, WORDS) == ""
    (row,) = read_cells(record)
    record.write_text(record.read_text().replace(row["data"], "0" * 16))
    assert CellsCsv(record).restore(tmp_path / "new", CONFIG, WORDS) == ""
    assert not (tmp_path / "new").exists()


def test_cells_are_added_to_those_that_are_there(record: Path, tmp_path: Path) -> None:
    failed = tmp_path / "failed"
    with RunFolder(failed) as run:
        run.open({**CONFIG, "seed": 2}, WORDS)
        run.finish(METRICS, {}, failed={"b": "no luck"})
    CellsCsv(record).add([finished(tmp_path / "again", {**CONFIG, "seed": 1}), failed])
    assert [row["cell"] for row in read_cells(record)] == ["again", "cell"]
    assert not CellsCsv(tmp_path / "none.csv").add([failed]) and not (tmp_path / "none.csv").exists()


LOOKS = [
    {"stage": "a", "step": 0, "held_out/loss": 2.5, "held_out/shuffled_loss": 2.5},
    {"stage": "a", "step": 1, "loss": 3.0},
    {"stage": "a", "step": 2, "held_out/loss": 1.23456789, "held_out/shuffled_loss": 2.0},
    {"stage": "a", "step": 2, "finished": True, "seconds": 1.0},
]


def test_what_a_cell_saw_while_it_trained_is_kept_and_restored(tmp_path: Path) -> None:
    record = tmp_path / "cells.csv"
    for seed in range(2):
        with RunFolder(tmp_path / f"cell{seed}") as run:
            run.open({**CONFIG, "seed": seed}, WORDS)
            for row in LOOKS if seed else ():
                run.log(row)
            run.finish(METRICS, {})
        CellsCsv(record).add([tmp_path / f"cell{seed}"])
    lines = (tmp_path / "looks.csv").read_text().splitlines()
    assert lines[0] == "cell,config,stage,step,held_out/loss,held_out/shuffled_loss"
    assert [line.split(",")[0] for line in lines[1:]] == ["cell1"] * 3 and lines[2].endswith(",a,2,1.23457,2")
    assert CellsCsv(record).restore(tmp_path / "new", {**CONFIG, "seed": 1}, WORDS) == RECORDED
    threshold = Threshold.parse("held_out/gap>0.5")
    passed = passage(RunFolder(tmp_path / "new").metrics(), threshold)
    assert passed == passage(LOOKS, threshold) == Passage(2.0, censored=False)
    text = (tmp_path / "looks.csv").read_text()
    CellsCsv(record).add([tmp_path / "new"])
    assert (tmp_path / "looks.csv").read_text() == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a,b\n", "has no column cell"), ("cell,config,stage,step\nc,0,a,x\n", "line 2 has a number that is none")],
)
def test_looks_that_are_none_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "looks.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_looks(tmp_path / "looks.csv")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a,b\n1,2\n", "no column cell"), ("cell,overrides,config,data,code\n1,2\n", "line 2 has not as many fields")],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        CellsCsv(tmp_path / "cells.csv")

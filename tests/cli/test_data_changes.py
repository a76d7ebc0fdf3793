"""A run, its data changed in every way, and the same command again: refused, or said."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tests.test_conf import composed

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from vlmlab.analyse.results import read_run
from vlmlab.cli.data import check_same
from vlmlab.contracts.errors import UserError
from vlmlab.data.provenance import changed_data, changed_since, data_of
from vlmlab.runs.config import plain
from vlmlab.runs.files import write_json
from vlmlab.runs.folder import RunFolder

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 200, 0), "yellow": (255, 255, 0)}
Rows = list[dict[str, Any]]


def rows(start: int = 0) -> Rows:
    names = list(COLOURS)
    return [
        {"question_id": start + i, "image": f"{i}.png", "question": "What colour?", "answer": names[i % 4]}
        for i in range(16)
    ]


def write(name: str, content: Rows) -> None:
    Path(name).write_text(json.dumps(content))


def blacken(name: str) -> None:
    Image.new("RGB", (16, 16)).save(name)
    os.utime(name, ns=(1, 1))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("img").mkdir()
    for i, colour in enumerate([*COLOURS.values()] * 4):
        Image.new("RGB", (8, 8), colour).save(f"img/{i}.png")
    write("train.json", rows())
    write("test.json", rows(100))
    return tmp_path


@functools.cache
def config() -> DictConfig:
    cfg: DictConfig = composed(
        "data=vqa", "data.path=train.json", "data.images=img", "data.test_path=test.json", "recipe=joint",
        "data.val_fraction=0.3",
    )  # fmt: skip
    return cfg


@functools.cache
def values() -> dict[str, Any]:
    return plain(config())


TRAINED: dict[str, tuple[Callable[[], object], str]] = {
    "answers": (lambda: write("train.json", [{**row, "answer": "purple"} for row in rows()]), "its annotations"),
    "one answer": (lambda: write("train.json", [{**rows()[0], "answer": "no"}, *rows()[1:]]), "its annotations"),
    "questions": (lambda: write("train.json", [{**row, "question": "Which?"} for row in rows()]), "its annotations"),
    "rows removed": (lambda: write("train.json", rows()[:-4]), r"\d+ samples before, \d+ now, its annotations"),
    "rows added": (lambda: write("train.json", [*rows(), {**rows()[0], "question_id": 99}]), "its annotations"),
    "order": (lambda: write("train.json", rows()[::-1]), "its annotations"),
    "images": (lambda: [blacken(f"img/{i}.png") for i in range(16)], "its image files"),
    "other images": (
        lambda: write("train.json", [{**row, "image": f"{i % 12}.png"} for i, row in enumerate(rows())]),
        "its annotations, the list of its images",
    ),
}
SCORED: dict[str, tuple[Callable[[], object], str]] = {
    "test answers": (lambda: write("test.json", [{**r, "answer": "purple"} for r in rows(100)]), "its annotations"),
    "test rows": (lambda: write("test.json", rows(100)[:5]), "16 samples before, 5 now"),
}


def begun(place: Path, *files: str) -> RunFolder:
    with RunFolder(place / "run") as run:
        run.open(values())
        check_same(run, config())
    for file in files:
        path = place / "run" / "stages" / "0_joint" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"learnt")
    return RunFolder(place / "run")


def again(run: RunFolder) -> None:
    with run:
        run.open(values())
        check_same(run, config())


@pytest.mark.parametrize("change", TRAINED)
def test_a_training_does_not_go_on_with_other_data(place: Path, change: str) -> None:
    run = begun(place, "last.ckpt")
    again(run)
    before = (run.path / "env.json").read_bytes()
    TRAINED[change][0]()
    with pytest.raises(
        UserError, match=rf"run has learnt from other data: data\.train\.instruct \(.*{TRAINED[change][1]}"
    ) as e:
        again(run)
    assert len(str(e.value)) <= 300 + len(str(run.path))
    env = json.loads((run.path / "env.json").read_text())
    assert env["data"] == json.loads(before)["data"]


def test_the_old_data_put_back_are_gone_on_with(place: Path) -> None:
    run = begun(place, "last.ckpt")
    TRAINED["answers"][0]()
    with pytest.raises(UserError, match="other data"):
        again(run)
    write("train.json", rows())
    again(run)


@pytest.mark.parametrize("change", [*TRAINED, *SCORED])
def test_before_anything_was_learnt_other_data_are_said_and_taken(
    place: Path, change: str, capsys: pytest.CaptureFixture
) -> None:
    run = begun(place)
    (TRAINED | SCORED)[change][0]()
    again(run)
    assert "since this run began its data have changed: data." in capsys.readouterr().out
    assert run.env()["data"] == data_of(config())


@pytest.mark.parametrize("change", SCORED)
def test_another_test_file_in_the_middle_of_a_training_is_said(
    place: Path, change: str, capsys: pytest.CaptureFixture
) -> None:
    run = begun(place, "last.ckpt")
    SCORED[change][0]()
    again(run)
    assert "data.benchmarks.vqa_test (" in capsys.readouterr().out


def test_what_was_scored_on_other_data_is_scored_anew(place: Path) -> None:
    run = begun(place, "model.safetensors")
    with run:
        run.open(values())
        run.finish({"vqa_test/vqa_accuracy": 0.5}, {}, {"val/instruct": "no luck"})
    trained_on = run.env()["data"]["train"]
    SCORED["test answers"][0]()
    TRAINED["answers"][0]()
    again(run)
    assert run.result() is None and (run.path / "result.old-1.json").exists()
    assert (
        run.env()["data"]["train"] == trained_on and run.env()["data"]["benchmarks"] == data_of(config())["benchmarks"]
    )


@pytest.mark.parametrize("change", [*TRAINED, *SCORED])
def test_a_finished_run_and_a_finished_cell_say_so(place: Path, change: str) -> None:
    run = begun(place, "model.safetensors")
    with run:
        run.open(values())
        run.finish({"vqa_test/vqa_accuracy": 0.5}, {})
    cell = Cell("run", run.path, [], {}, config(), config=values())
    assert changed_since(run.env(), config()) == ""
    assert cell.settle_finished() and cell.note == "finished before"
    (TRAINED | SCORED)[change][0]()
    assert changed_since(run.env(), config()).startswith("made with other data: data.")
    cell = Cell("run", run.path, [], {}, config(), config=values())
    assert cell.settle_finished() and cell.note.startswith("made with other data: data.")
    assert read_run(run.path).other_data


def test_a_finished_run_whose_data_are_gone_says_that(place: Path) -> None:
    run = begun(place)
    Path("train.json").unlink()
    assert changed_since(run.env(), config()) == "its data cannot be read any more"


def test_held_out_rows_that_nobody_asks_for_need_not_be_there(place: Path) -> None:
    cfg = OmegaConf.merge(config(), {"data": {"val_fraction": 0.0}, "evaluation": {"held_out": []}})
    assert isinstance(cfg, DictConfig) and data_of(cfg)["train"]["instruct"]["rows"] == 16


def test_runs_of_before_have_no_fingerprints(place: Path) -> None:
    run = begun(place, "last.ckpt")
    write_json(run.path / "env.json", {key: value for key, value in run.env().items() if key != "data"})
    TRAINED["answers"][0]()
    assert changed_since(run.env(), config()) == ""
    again(run)
    assert run.env()["data"]


def test_what_only_one_of_two_knows_is_left_alone() -> None:
    old = {"train": {"a": {"rows": 2, "files": "x", "sources": [{"files": "1"}, {"files": "2"}]}, "gone": {"rows": 1}}}
    new = {"train": {"a": {"rows": 2, "images": "content", "sources": [{"files": "1"}, {"files": "3"}]}}}
    assert changed_data(old, new) == ["data.train.a (its annotations)"]
    assert changed_data(old, old) == [] and changed_data({}, new) == []
    assert changed_data({"train": {"a": {"seed": 1}}}, {"train": {"a": {"seed": 2}}}) == [
        "data.train.a (seed: 1 before, 2 now)"
    ]

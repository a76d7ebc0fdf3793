"""What is shown of cells while they run: loss, last score, time left, and whole headings at 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from hydra_plugins.vlmlab_pool_launcher._display import Lines, Watcher, drawn, duration, losses, steps_of
from vlmlab.runs.folder import RunFolder

RECIPE = {"recipe": {"stages": {"align": {"steps": 100}, "dense": {"steps": 300}}}}


def cell(folder: Path, name: str, state: str = "waiting", **more: object) -> Cell:
    (folder / name).mkdir(exist_ok=True)
    made = Cell(name, folder / name, [], {}, None, config=RECIPE, **more)  # type: ignore[arg-type]
    made.state = state  # type: ignore[assignment]
    return made


def at(cell: Cell, stage: str, step: int) -> None:
    """Let a cell's process be at a step."""
    run = RunFolder(cell.folder)
    run.write_state("running", stage, step, 300)
    run.log({"stage": stage, "step": step, "loss": 1.5})
    run.log({"stage": stage, "step": step, "held_out/loss": 2.25})


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    """One done, one running, two that wait."""
    done, running = cell(tmp_path, "a" * 60, "done", seconds=300.0), cell(tmp_path, "b", "running", seconds=100.0)
    (done.folder / "result.json").write_text(json.dumps({"metrics": {"quiz/vqa_accuracy": 0.8125}}))
    at(running, "align", 50)
    return [done, running, cell(tmp_path, "c"), cell(tmp_path, "d")]


def test_time_left(cells: list[Cell]) -> None:
    watcher, running = Watcher(slots=2), cells[1]
    assert steps_of(running) == (50, 400) and steps_of(cells[2]) is None
    assert watcher.seconds_left(running, 1000.0) is None and watcher.all_left(cells, 1000.0) is None
    at(running, "dense", 50)  # 100 steps in 50 seconds, 250 to go
    assert watcher.seconds_left(running, 1050.0) == 125.0
    assert watcher.all_left(cells, 1050.0) == (125 + 2 * (300 + 225) / 2) / 2
    assert watcher.all_left(cells[:2], 1050.0) == 125.0
    assert watcher.all_left(cells[:1], 1050.0) is None
    assert [duration(seconds) for seconds in (None, 45.2, 720.0, 12600.0)] == ["", "45 s", "12 min", "3.5 h"]


def test_steps_are_those_of_the_budget(cells: list[Cell]) -> None:
    cells[1].config = {**RECIPE, "budget": {"steps_scale": 0.3, "max_steps": 80}}
    assert steps_of(cells[1]) == (50, 30 + 80)


def test_losses(cells: list[Cell], tmp_path: Path) -> None:
    assert losses(cells[1].folder) == "1.5/2.25"
    with (cells[1].folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "align", "step": 51, "loss": "nan"}\n{"loss": 1.2}\n{"loss": 9')
    assert losses(cells[1].folder) == "1.2/2.25"
    assert losses(tmp_path) == ""


def test_the_live_table_keeps_its_headings_at_eighty_columns(cells: list[Cell]) -> None:
    watcher = Watcher(slots=2)
    drawn(cells, watcher, 1000.0)
    at(cells[1], "dense", 50)
    out = io.StringIO()
    Console(file=out, width=80).print(drawn(cells, watcher, 1050.0))
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["cell", "state", "where", "loss", "score", "spent", "left"]
    assert max(map(len, lines)) <= 80
    text = " ".join(out.getvalue().split())
    assert "0.812" in text and "1.5/2.25" in text and "2 min" in text
    assert "1 done, 1 running, 2 waiting; about 5 min left" in text


def test_lines_say_what_changed_once(cells: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    show = Lines(slots=2)
    show(cells)
    show(cells)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"[1/4] {'a' * 60}: done (score 0.812)" and len(out) == 4
    assert out[1].startswith("[1/4] b: running align 50/300 (loss 1.5/2.25")

"""The pool launcher, driven through the train command around a fake training."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_app import call, lay_down, start, trained
from omegaconf import OmegaConf

from hydra_plugins.vlmlab_pool_launcher import _slots
from hydra_plugins.vlmlab_pool_launcher._cells import Cell, as_printed, refuse_training_twice
from hydra_plugins.vlmlab_pool_launcher._slots import make_slots, visible_gpus
from vlmlab.analyse.results import read_run
from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import UserError
from vlmlab.runs.cells_csv import CellsCsv, read_cells
from vlmlab.runs.folder import RunFolder

SWEEP = ("-m", "name=s", "x=1,2", "y=1,2", "seed=0")
CELLS = ["x-1_y-1", "x-1_y-2", "x-2_y-1", "x-2_y-2"]


def counts(sweep: Path) -> list[int]:
    return [trained(sweep / cell) for cell in CELLS]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 150) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_failed_cells_leave_the_others_and_are_the_only_ones_run_again(tmp_path: Path) -> None:
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    (tmp_path / "bad").write_text("kill 21")
    code, out, err = call(script, *SWEEP)
    assert code == 1 and counts(sweep) == [1, 1, 1, 1]
    assert [RunFolder(sweep / cell).state()["state"] for cell in CELLS] == ["done", "done", "failed", "done"]
    assert RunFolder(sweep / CELLS[2]).state()["error"] == "killed by SIGKILL"
    assert err.startswith("error: 1 of 4 cells did not finish: x-2_y-1 (killed by SIGKILL)") and err.count("\n") == 1
    assert "[4/4]" in out and "x-2_y-1: failed killed by SIGKILL" in out
    assert (sweep / "table.csv").is_file() and "failed" in (sweep / "table.csv").read_text()
    assert "training 1 2" in (sweep / CELLS[1] / "log.txt").read_text()

    (tmp_path / "bad").write_text("fail 21")
    code, _, err = call(script, *SWEEP)
    assert code == 1 and counts(sweep) == [1, 1, 2, 1] and "x-2_y-1 (no luck with x)" in err

    (tmp_path / "bad").unlink()
    code, out, err = call(script, *SWEEP)
    assert (code, err) == (0, "") and counts(sweep) == [1, 1, 3, 1]
    assert len(re.findall(r"y-\d: done (finished before|made by other code)", out)) == 3  # and none of them started
    assert "failed" not in (sweep / "table.csv").read_text() and (sweep / "figure.png").stat().st_size > 0

    code, out, _ = call(script, "x=2", "y=1", "seed=0", f"hydra.run.dir={sweep / CELLS[2]}")
    assert code == 0 and "is finished" in out and counts(sweep) == [1, 1, 3, 1]  # the launcher's hash is the run's


def test_a_recorded_cell_is_not_trained_again_on_another_machine(tmp_path: Path) -> None:
    script, sweep, record = lay_down(tmp_path), tmp_path / "sweeps" / "s", tmp_path / "cells.csv"
    words = ("-m", "name=s", "x=1", "y=1,2", "seed=0,1", f"hydra.launcher.record={record}")
    assert call(script, *words)[0] == 0
    before = {path.name: read_run(path).metrics for path in sweep.glob("y-*")}
    record.write_text("".join(line for line in record.open() if not line.startswith("y-2_seed-1")))
    shutil.rmtree(sweep)
    code, out, _ = call(script, *words)
    assert code == 0 and "3 finished cells (y-1_seed-0, y-1_seed-1, y-2_seed-0): recorded\n" in out
    assert {name: trained(sweep / name) for name in before} == dict.fromkeys(before, 0) | {"y-2_seed-1": 1}
    assert {path.name: read_run(path).metrics for path in sweep.glob("y-*")} == before
    assert [row["cell"] for row in read_cells(record)] == sorted(before)


def test_fresh_trains_a_recorded_cell(tmp_path: Path) -> None:
    config = {"seed": 0}
    with RunFolder(tmp_path / "old") as run:
        run.open(config)
        run.finish({"a/vqa_accuracy": 0.5}, {})
    record = CellsCsv(tmp_path / "cells.csv")
    record.add([tmp_path / "old"])
    one = replace(cell(), folder=tmp_path / "new", config=config)
    assert not replace(one, fresh=True).settle_recorded(record)
    assert one.settle_recorded(record) and one.state == "done"


def test_a_killed_launcher_leaves_no_orphan_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    assert call(script, "-m", "name=s", "x=1", "y=1,2", "seed=0", "hydra.launcher.slots=1")[0] == 0
    done = [sweep / "y-1", sweep / "y-2"]
    assert [trained(folder) for folder in done] == [1, 1]
    (tmp_path / "bad").write_text("wait")
    launcher = start(script, "-m", "name=s", "x=1", "y=1,2,3,4", "seed=0")
    running = [sweep / "y-3", sweep / "y-4"]
    assert wait_for(lambda: all(trained(folder) for folder in running))
    pids = [int((folder / "trained.txt").read_text().split()[0]) for folder in running]
    assert all(map(alive, pids))
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate(timeout=60)
    (tmp_path / "bad").unlink()
    code, _, err = call(script, "-m", "name=s", "x=1", "y=1,2,3,4", "seed=0")
    assert not any(map(alive, pids))
    assert (code, err) == (0, "")
    assert [trained(folder) for folder in done] == [1, 1]
    assert [trained(folder) for folder in running] == [2, 2]


def test_a_signal_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    (tmp_path / "bad").write_text("wait")
    launcher = start(script, *SWEEP)
    assert wait_for(lambda: sum(counts(sweep)) == 2)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 130, err
    assert counts(sweep) == [1, 1, 0, 0]
    assert [RunFolder(sweep / cell).state()["state"] for cell in CELLS[:2]] == ["interrupted"] * 2
    assert "2 interrupted" in out or "interrupted" in out
    assert (sweep / "table.csv").is_file()


def test_folders_that_cannot_be_had_fail_their_cells_alone(tmp_path: Path) -> None:
    """A file and a dead link where cells' folders are due, and one that is removed while it trains."""
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    sweep.mkdir(parents=True)
    (sweep / CELLS[0]).write_text("somebody's")
    (sweep / CELLS[1]).symlink_to("/nowhere")
    (tmp_path / "bad").write_text("gone 21")
    code, out, err = call(script, *SWEEP)
    assert code == 1 and err.startswith("error: 3 of 4 cells did not finish: x-1_y-1 (") and err.count("\n") == 1
    assert out.count("is a file or a link that leads nowhere, not a folder; remove it") == 4  # and in the table
    assert f"{CELLS[2]}: failed sweeps/s/{CELLS[2]}: its folder is gone" in out
    assert RunFolder(sweep / CELLS[3]).state()["state"] == "done"
    rows = (sweep / "table.csv").read_text().splitlines()
    assert len(rows) == 5 and sum(",0,1 failed," in row for row in rows) == 3, rows

    (sweep / CELLS[0]).unlink()
    (sweep / CELLS[1]).unlink()
    (tmp_path / "bad").unlink()
    code, _, err = call(script, *SWEEP)
    assert (code, err) == (0, "") and [trained(sweep / cell) for cell in CELLS] == [1, 1, 1, 1]


def test_values_that_hydra_prints_otherwise(tmp_path: Path) -> None:
    """They are not a sweep, and two ways to write one value are one cell."""
    script = lay_down(tmp_path)
    words = ("fresh=False", "y=1e-3", "part='small'", "x=1.0,1.00,2")
    code, out, err = call(script, "-m", "name=s", *words)
    assert (code, err) == (0, ""), err
    cells = sorted(path.name for path in (tmp_path / "sweeps" / "s").iterdir() if path.is_dir())
    assert cells == ["x-1.0", "x-2"] and "2 cells" in out
    assert [trained(tmp_path / "sweeps" / "s" / cell) for cell in cells] == [1, 1]
    assert as_printed(["a= False", "b=1e-3", "c='x y'", "d=1,2", "+e=[1, 2]"]) == {
        "a=False", "b=0.001", "c='x y'", "+e=[1,2]",
    }  # fmt: skip


def test_a_cell_over_its_time_is_stopped(tmp_path: Path) -> None:
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    (tmp_path / "bad").write_text("wait")
    code, _, err = call(script, "-m", "name=s", "part=small", "hydra.launcher.timeout=20")
    assert code == 1 and "default (stopped after hydra.launcher.timeout=20 seconds)" in err
    assert RunFolder(sweep / "default").state()["state"] in ("interrupted", "failed")


def cell(devices: int = 1, accelerator: str = "auto") -> Cell:
    return Cell("c", Path("c"), [], {}, None, devices=devices, accelerator=accelerator)  # type: ignore[arg-type]


def pair(**changes: Any) -> list[Cell]:
    """Two cells that differ in their evaluation alone, and in these keys from what stages can share."""
    base = {"seed": 0, "share_stages": "auto", "trainer": {"devices": 1}, "recipe": {"stages": {"one": {"steps": 2}}}}
    configs = [base | changes | {"evaluation": {"batch_size": size}} for size in (1, 2)]
    return [Cell(f"size-{k}", Path(), [], {}, OmegaConf.create(), config) for k, config in enumerate(configs)]


def test_cells_of_one_training_share_it_or_the_sweep_does_not_begin() -> None:
    for shared in ({}, {"share_stages": False, "fresh": True}, {"seed": None}):
        refuse_training_twice(pair(**shared))
    mixed = {"recipe": {"stages": {"one": {"mix": {"run": "outputs/x"}}}}}
    for several, words in [
        ({"trainer": {"devices": 2}}, "several ranks would have to agree"),
        ({"trainer": {"devices": 1, "nodes": 2}}, "several ranks would have to agree"),
        ({"fresh": True}, "fresh=true trains again"),
        (mixed, "recipe.stages.one is mixed with another run"),
    ]:
        with pytest.raises(ConfigError, match=f"size-0 and size-1 are one training.*{words}.*share_stages=false"):
            refuse_training_twice(pair(**several))
        one, other = pair(**several)
        assert other.config is not None
        other.config["trainer"] = {"devices": 3}
        refuse_training_twice([one, other])


def test_slots_are_gpus_or_pairs_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_slots, "cores", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-x")
    assert visible_gpus() == ["2", "GPU-x"]
    assert make_slots([cell()], None) == ["2", "GPU-x"]
    assert make_slots([cell()], 3) == ["2", "GPU-x", "2"]
    assert make_slots([cell(accelerator="cpu")], None) == ["", "", ""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make_slots([cell()], None) == ["", "", ""]
    everything = cell(devices=-1)
    assert len(make_slots([everything], 2)) == everything.devices == 2
    with pytest.raises(UserError, match=r"trainer\.devices=4 and there are 3 slots"):
        make_slots([cell(devices=4)], None)
    with pytest.raises(UserError, match=r"hydra\.launcher\.slots=0"):
        make_slots([cell()], 0)


def test_gpus_are_listed_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: GPU-a)'\necho '  MIG 1g'\necho 'GPU 1: X (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert visible_gpus() == ["0", "1"]


def test_gpus_are_given_to_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = lay_down(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    arguments = ("trainer.accelerator=gpu", "hydra.launcher.slots=null", "recipe.stages.one.batch_size=2")
    code, _, err = call(script, "-m", "name=s", *arguments, "trainer.devices=1,2")
    assert code == 0, err
    seen = [(tmp_path / "sweeps" / "s" / f"trainer.devices-{n}" / "trained.txt").read_text().split()[1] for n in (1, 2)]
    assert seen[0] in ("4", "5") and seen[1] in ("4,5", "5,4")

"""The same cells by the pool, by submitit and by Ray; a job that is preempted; a signal to the launcher."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_app import call, lay_down, start, trained

from vlmlab.analyse.results import read_sweep
from vlmlab.runs.folder import RunFolder

pytestmark = pytest.mark.slow
WORDS = ("-m", "name=s", "x=1,2", "y=1,2", "seed=0", "hydra.launcher.slots=4")
LOCAL = ("hydra/launcher=slurm", "hydra.launcher.cluster=local")
BY = {"pool": (), "submitit": LOCAL, "ray": ("hydra/launcher=ray", "hydra.launcher.cpus=0.25")}


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


def test_the_same_cells_have_the_same_results(tmp_path: Path) -> None:
    names = [name for name in BY if name == "pool" or importlib.util.find_spec(name)]
    if names == ["pool"]:
        pytest.skip("neither submitit nor ray is installed")
    found = {}
    for name in names:
        (tmp_path / name).mkdir()
        code, out, err = call(lay_down(tmp_path / name), *WORDS, *BY[name])
        assert (code, err) == (0, ""), err
        records = read_sweep(tmp_path / name / "sweeps" / "s")
        assert [trained(record.folder) for record in records] == [1] * 4 and "4 cells: 4 done" in out
        found[name] = [(r.folder.name, r.state, r.metrics, r.cost, r.overrides) for r in records]
    assert not list(tmp_path.glob("*/sweeps/s/*/job.json"))
    assert all(cells == found["pool"] for cells in found.values())


def test_a_preempted_job_goes_on_and_a_signal_ends_all(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    (tmp_path / "bad").write_text("wait")
    launcher = start(script, "-m", "name=s", "x=1", "y=1,2", "seed=0", *LOCAL)
    cells = [sweep / "y-1", sweep / "y-2"]
    assert wait_for(lambda: all(trained(cell) == 1 for cell in cells))
    (tmp_path / "bad").unlink()
    job = re.search(r"process (\d+)", (cells[0] / "log.txt").read_text())
    assert job is not None
    os.kill(int(job[1]), signal.SIGUSR2)  # what SLURM sends before it takes a job's machine away
    assert wait_for(lambda: RunFolder(cells[0]).state().get("state") == "done")
    assert trained(cells[0]) == 2 and "the job was preempted" in (cells[0] / "log.txt").read_text()
    assert trained(cells[1]) == 1
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 130 and "Traceback" not in err, err
    assert RunFolder(cells[1]).state()["state"] == "interrupted"
    assert (sweep / "table.csv").is_file() and "1 interrupted" in out

"""A cell that fails is tried again later, one without progress is reported, and a scheduler's is told by a file."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from pretend import Pretend

from hydra_plugins.vlmlab_pool_launcher import _pool
from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from hydra_plugins.vlmlab_pool_launcher._display import progress
from hydra_plugins.vlmlab_pool_launcher._pool import Patience, Pool
from hydra_plugins.vlmlab_pool_launcher._scheduled import Scheduled, Submitit, slurm_parameters
from hydra_plugins.vlmlab_pool_launcher._sweep import Options, places_for
from hydra_plugins.vlmlab_pool_launcher._worker import CellCommand, among
from hydra_plugins.vlmlab_pool_launcher.launcher import SlurmLauncherConf
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules.machine import nodes_are_found
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.watchdog import is_further_rank


def cell(folder: Path, name: str = "c", **more: Any) -> Cell:
    return Cell(name, folder / name, [], {}, None, **more)  # type: ignore[arg-type]


def finish(folder: Path) -> int:
    with RunFolder(folder) as run:
        run.open({"seed": 0})
        run.finish({"a/vqa_accuracy": 0.5}, {})
    return 0


def test_a_failed_cell_is_tried_again_later_and_a_mistake_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(_pool.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(_pool.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + 1.0))
    cells = [cell(tmp_path, name) for name in ("luck", "never", "wrong")]
    for one in cells:
        one.folder.mkdir()
    starts: list[tuple[str, float]] = []
    told: list[str] = []

    def life(one: Cell, tick: int) -> int:
        starts.append((one.name, clock[0]))
        if one.name == "luck" and one.tries == 2:
            return finish(one.folder)
        return 2 if one.name == "wrong" else 1

    def show(all_cells: object) -> None:
        told.extend(one.note for one in cells if one.note not in told)

    Pool([""] * 3, lambda one: [], Patience(retries=2, backoff=5.0), show, Pretend(life)).run(cells)
    assert [(one.name, one.state, one.tries) for one in cells] == [
        ("luck", "done", 2), ("never", "failed", 2), ("wrong", "failed", 0),
    ]  # fmt: skip
    first, second, third = [when for name, when in starts if name == "luck"]
    assert second - first >= 5 and third - second >= 10 and [n for n, _ in starts].count("wrong") == 1
    assert "failed: exit code 1; tried again in 5 s, 1 of 2" in told


def test_a_cell_without_a_sign_of_life_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(_pool.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(_pool.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + 100.0))
    one = cell(tmp_path)
    one.folder.mkdir()
    (one.folder / "log.txt").write_text("begun")
    wall = (one.folder / "log.txt").stat().st_mtime
    monkeypatch.setattr(_pool.time, "time", lambda: wall + clock[0])
    said: list[str] = []

    def show(cells: object) -> None:
        said.append(progress(one))

    Pool([""], lambda one: [], Patience(stalled=250), show, Pretend(lambda _, tick: 1 if tick > 5 else None)).run([one])
    assert said[:2] == ["starting"] * 2 and said[4] == "starting, no progress for more than 4 min"


def test_devices_of_a_cell_that_takes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    cells = [cell(tmp_path, devices=-1), cell(tmp_path, devices=1)]
    assert places_for(cells, Options(devices_per_cell=2)) == ["0", "1", "2", "3"] and cells[0].devices == 2
    with pytest.raises(ConfigError, match="cell c takes all devices there are, and a scheduler has to be asked"):
        places_for([cell(tmp_path, devices=-1)], Options(site=lambda sweep: Pretend(lambda *_: 0)))
    assert places_for(cells, Options(site=lambda sweep: Pretend(lambda *_: 0))) == ["", ""]


def test_a_job_is_queued_until_its_first_line_and_told_by_its_file(tmp_path: Path) -> None:
    one = cell(tmp_path)
    job = Scheduled(one, "slurm", "12_3")
    assert job.waits() == "queued, slurm job 12_3"
    assert json.loads((one.folder / "job.json").read_text()) == {"scheduler": "slurm", "id": "12_3"}
    CellCommand([], str(one.folder), ".")._log("on a machine")
    assert job.waits() == ""
    job.note({"stop": int(signal.SIGTERM)})
    stopped = CellCommand(
        ["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done"], str(one.folder), str(tmp_path)
    )
    assert stopped() in (7, -signal.SIGTERM)  # the signal may come before the trap is set
    assert job.over(7) == 7 and not (one.folder / "job.json").exists()


def test_keys_of_slurm_are_those_of_its_script(tmp_path: Path) -> None:
    """The script that sbatch gets: submitit's own, of our keys."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    from submitit.slurm.slurm import _make_sbatch_string

    keys = SlurmLauncherConf(partition="gpu", minutes=90, memory=32, setup=["module load cuda"], more={"nice": 5})
    site = Submitit.__new__(Submitit)
    site.parameters = slurm_parameters(vars(keys))
    asked = site.of(2, 3, gpu=True)
    plain = {key.removeprefix("slurm_"): value for key, value in asked.items()}
    renamed = {"name": "job_name", "timeout_min": "time", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}
    plain = {renamed.get(key, key): value for key, value in plain.items()}
    script = _make_sbatch_string(command="cell", folder=str(tmp_path), map_count=4, **plain | {"mem": "32GB"})
    for line in (
        "--partition=gpu", "--time=90", "--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=2", "--mem=32GB",
        "--signal=USR2@120", "--array=0-3%4", "--nice=5", "--cpus-per-task=4",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in script, script
    assert "module load cuda" in script


def test_each_machine_of_a_job_finds_the_others() -> None:
    first, second = (among(node, "node7", "3141_2") for node in (0, 1))
    assert first == {"NODE_RANK": "0", "MASTER_ADDR": "node7", "MASTER_PORT": "21412"}
    assert second == first | {"NODE_RANK": "1", "RANK": "1"}


def test_only_rank_zero_of_the_first_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not is_further_rank()
    monkeypatch.setenv("NODE_RANK", "1")
    assert is_further_rank()


def test_several_machines_are_asked_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    config = {"trainer": {"nodes": 2}}
    slurm = {"_mode": "MULTIRUN", "hydra/launcher": "slurm"}
    assert nodes_are_found({"trainer": {"nodes": 1}}, {}) is None and nodes_are_found(config, slurm) is None
    said = str(nodes_are_found(config, slurm | {"hydra/launcher": "pool"}))
    assert said.startswith("trainer.nodes=2 wants machines: add -m sweep=slurm") and len(said) < 300
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert nodes_are_found(config, {"_mode": "RUN"}) is None


def test_a_preempted_cell_saves_and_is_handed_back(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    ready = tmp_path / "ready"
    loop = f"trap 'touch {tmp_path}/saved; exit 143' TERM; touch {ready}; while :; do sleep 0.05; done"
    command = CellCommand(["sh", "-c", loop], str(tmp_path / "c"), str(tmp_path))
    from hydra_plugins.vlmlab_pool_launcher._job import environment_of, start_process

    command._process = start_process(command.folder, command.command, environment_of([], 1))
    while not ready.exists():
        pass
    again = command.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and (tmp_path / "saved").exists()
    assert again.function.__getstate__()["_process"] is None and command._process.returncode == 143
    assert "preempted" in (tmp_path / "c" / "log.txt").read_text()

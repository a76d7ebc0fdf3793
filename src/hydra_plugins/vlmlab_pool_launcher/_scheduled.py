"""Cells as jobs of a scheduler: SLURM by submitit, or Ray."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from hydra_plugins.vlmlab_pool_launcher._job import Start
from hydra_plugins.vlmlab_pool_launcher._worker import CellCommand
from vlmlab.cli.entry import ConfigError
from vlmlab.runs.files import read_json, write_json
from vlmlab.runs.progress import JOB

SUBMITTED = "submitit"
"""Folder below the sweep's for what submitit writes: its scripts and the jobs' own output."""
LOST = 1
"""Exit code of a cell whose job ended without one."""
ASK_S = 15.0
"""Seconds between two questions to SLURM's queue about a job of which nothing else is known."""


def queued(number: str) -> bool:
    """Whether a job of SLURM's waits or runs; where the queue does not answer, it may."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", f"--jobs={number}"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return bool(asked.stdout.strip()) if asked.returncode == 0 else "Invalid job id" not in asked.stderr


class Scheduled:
    """A cell that a scheduler has: waits, runs, and is told by ``job.json`` what signal it gets.

    Args:
        cell: which.
        scheduler: its name, in words.
        number: of the job.
    """

    def __init__(self, cell: Cell, scheduler: str, number: str) -> None:
        self.cell, self.scheduler, self.number = cell, scheduler, number
        self.ended: int | None = None
        self._size = self._written()
        self._begun = False
        self.note({})

    def waits(self) -> str:
        """That its job is queued, until it has written its first line."""
        if not self._begun:
            self._begun = self.ended is not None or self._written() > self._size
        return "" if self._begun else f"queued, {self.scheduler} job {self.number}"

    def note(self, more: dict[str, Any]) -> None:
        """Write ``job.json``."""
        with contextlib.suppress(OSError):
            self.cell.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.cell.folder / JOB, {"scheduler": self.scheduler, "id": self.number} | more)

    def over(self, code: int) -> int:
        """Record that it has ended."""
        self.ended = code
        (self.cell.folder / JOB).unlink(missing_ok=True)
        return code

    def _written(self) -> int:
        try:
            return (self.cell.folder / "log.txt").stat().st_size
        except OSError:
            return 0


class SubmititJob(Scheduled):
    """A job of submitit's.

    Args:
        cell: which.
        job: submitit's.
        scheduler: its name.
    """

    def __init__(self, cell: Cell, job: Any, scheduler: str) -> None:
        self.job = job
        self._ask_at, self._missed = time.monotonic() + ASK_S, 0
        super().__init__(cell, scheduler, str(job.job_id))

    def poll(self) -> int | None:
        """The cell's exit code; `LOST` with the job's state as the cell's note where it has none."""
        if self.ended is not None:
            return self.ended
        if not self.job.done():
            if not self._gone():
                return None
            self.cell.note = self.cell.note or f"{self.scheduler} job {self.number} is gone and left no result"
            return self.over(LOST)
        codes = (self._code(self.job.task(machine)) for machine in range(self.job.num_tasks))
        return self.over(next((code for code in codes if code), 0))

    def _code(self, task: Any) -> int:
        """The exit code of the cell on one of its machines."""
        if not task.paths.result_pickle.is_file():
            self.cell.note = self.cell.note or f"{self.scheduler} job {self.number} ended as {self.job.state}"
            return LOST
        kind, value = task._get_outcome_and_result()
        if kind == "error":
            self.cell.note = self.cell.note or f"{self.scheduler} job {self.number}: {str(value).splitlines()[-1]}"
            return LOST
        return int(value)

    def _gone(self) -> bool:
        """Whether the queue has twice not known the job, where SLURM keeps no accounts and so says no state."""
        if self.scheduler != "slurm" or time.monotonic() < self._ask_at or self.job.state != "UNKNOWN":
            return False
        self._ask_at = time.monotonic() + ASK_S
        self._missed = 0 if queued(self.number) else self._missed + 1
        return self._missed > 1

    def send(self, number: int) -> None:
        """Tell a running cell by ``job.json``; a job that is still queued is cancelled."""
        if self.waits():
            self.job.cancel(check=False)
            self.over(128 + number)
        else:
            self.note({"stop": int(number)})

    def kill(self) -> None:
        """Cancel the job, unless it has ended."""
        if self.ended is None:
            self.job.cancel(check=False)


def slurm_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `SlurmLauncherConf` as submitit has them."""
    if given["cluster"] == "local":
        return {"timeout_min": given["minutes"]}
    named = ("partition", "account", "qos", "constraint")
    found = {f"slurm_{key}": given[key] for key in named if given.get(key) is not None}
    memory = {} if given["memory"] is None else {"mem_gb": given["memory"]}
    return found | memory | {
        "timeout_min": given["minutes"],
        "cpus_per_task": given["cpus"],
        "slurm_signal_delay_s": given["signal_s"],
        "slurm_array_parallelism": given["array"],
        "slurm_setup": [str(line) for line in given["setup"]],
        "slurm_additional_parameters": dict(given["more"]),
    }  # fmt: skip


class Submitit:
    """Cells as jobs of submitit's: arrays on SLURM, or processes of this machine.

    Args:
        sweep: the sweep's folder.
        cluster: ``slurm``, or ``local``.
        parameters: of submitit's executor, as ``slurm_partition``.
        requeues: how often a job that has reached its time goes on.

    Raises:
        ConfigError: submitit or SLURM is not there, or a parameter is none.
    """

    def __init__(self, sweep: Path, cluster: str, parameters: dict[str, Any], requeues: int) -> None:
        try:
            submitit = importlib.import_module("submitit")
        except ImportError as error:
            raise ConfigError("sweep=slurm needs submitit; pip install 'vlmlab[slurm]'") from error
        self.submitit, self.cluster, self.parameters = submitit, cluster, parameters
        self.folder = sweep.resolve() / SUBMITTED
        try:
            self.executor = submitit.AutoExecutor(
                str(self.folder / "%j"), cluster=cluster, slurm_max_num_timeout=requeues, local_max_num_timeout=requeues
            )
            self.executor.update_parameters(**self.of(1, 1))
        except (RuntimeError, NameError, ValueError, TypeError) as error:
            raise ConfigError(f"sweep=slurm cannot work here: {' '.join(str(error).split())}") from error

    def needs(self, cell: Cell) -> int:
        """One place in the queue."""
        return 1

    def of(self, devices: int, nodes: int, gpu: bool = False) -> dict[str, Any]:
        """The parameters of a job for a cell with so many devices on each of so many machines."""
        named = {"nodes": nodes, "tasks_per_node": 1} | ({"gpus_per_node": devices} if gpu else {})
        return named | {"name": "vlmlab", "stderr_to_stdout": True} | self.parameters

    def start(self, starts: Sequence[Start]) -> None:
        """Submit the cells, those with like needs as one array; a job of an earlier launcher is taken up again."""
        left = [one for one in starts if not self._taken_up(one.cell)]
        alike: dict[tuple[int, int, bool], list[Start]] = {}
        for one in left:
            alike.setdefault((one.cell.devices, one.cell.nodes, one.cell.accelerator != "cpu"), []).append(one)
        for (devices, nodes, gpu), group in alike.items():
            self.executor.update_parameters(**self.of(devices, nodes, gpu and self.cluster == "slurm"))
            with self.executor.batch():
                jobs = [self.executor.submit(self._command(one)) for one in group]
            for one, job in zip(group, jobs, strict=True):
                with one.cell.own_fault():
                    one.cell.process = SubmititJob(one.cell, job, self.cluster)

    def _command(self, one: Start) -> CellCommand:
        return CellCommand(one.command, str(one.cell.folder.resolve()), os.getcwd(), one.cell.nodes)

    def _taken_up(self, cell: Cell) -> bool:
        """Whether the job that an earlier launcher has submitted for a cell is still queued or runs."""
        known = read_json(cell.folder / JOB)
        if self.cluster != "slurm" or known is None or known.get("scheduler") != "slurm":
            return False
        job: Any = self.submitit.SlurmJob(folder=self.folder / "%j", job_id=str(known.get("id")), tasks=[0])
        if job.done(force_check=True) or (job.state == "UNKNOWN" and not queued(job.job_id)):
            return False
        cell.process = SubmititJob(cell, job, self.cluster)
        return True

    def close(self) -> None:
        """Nothing is left: jobs that have not ended are cancelled by then."""


class RayJob(Scheduled):
    """A task of Ray's.

    Args:
        cell: which.
        ray: the module.
        task: its reference.
    """

    def __init__(self, cell: Cell, ray: Any, task: Any) -> None:
        self.ray, self.task = ray, task
        super().__init__(cell, "ray", task.hex()[:16])

    def poll(self) -> int | None:
        """The cell's exit code; `LOST` with the reason as the cell's note where Ray lost it."""
        if self.ended is not None:
            return self.ended
        done, _ = self.ray.wait([self.task], timeout=0)
        if not done:
            return None
        try:
            return self.over(int(self.ray.get(self.task)))
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            self.cell.note = self.cell.note or f"Ray lost it: {lines[-1].strip() if lines else type(error).__name__}"
            return self.over(LOST)

    def send(self, number: int) -> None:
        """Tell a running cell by ``job.json``; a task that is still queued is cancelled."""
        if self.waits():
            self.ray.cancel(self.task, force=True)
            self.over(128 + number)
        else:
            self.note({"stop": int(number)})

    def kill(self) -> None:
        """End the task, unless it has ended."""
        if self.ended is None:
            self.ray.cancel(self.task, force=True)


class Ray:
    """Cells as tasks of Ray's, which finds them a machine.

    Args:
        address: of a cluster; None: one is started on this machine and ends with the sweep.
        cpus: that a cell takes for each of its devices.

    Raises:
        ConfigError: Ray is not there, or no cluster answers.
    """

    def __init__(self, address: str | None, cpus: float) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError("sweep=ray needs ray; pip install 'vlmlab[ray]'") from error
        self.ray, self.cpus = ray, cpus
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level="ERROR",
                include_dashboard=None if address else False,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"hydra.launcher.address={address}: no cluster answers ({error})") from error
        self.gpus = float(ray.cluster_resources().get("GPU", 0))

    def needs(self, cell: Cell) -> int:
        """One place in the queue."""
        return 1

    def start(self, starts: Sequence[Start]) -> None:
        """Hand the cells to Ray."""
        for one in starts:
            with one.cell.own_fault():
                command = CellCommand(one.command, str(one.cell.folder.resolve()), os.getcwd())
                gpus = one.cell.devices if self.gpus and one.cell.accelerator != "cpu" else 0
                options = {"num_cpus": self.cpus * one.cell.devices, "num_gpus": gpus, "max_retries": 0}
                remote = self.ray.remote(_run).options(**options)
                one.cell.process = RayJob(one.cell, self.ray, remote.remote(command))

    def close(self) -> None:
        """Leave the cluster, or end the one that was started."""
        self.ray.shutdown()


def _run(command: CellCommand) -> int:
    """What Ray calls."""
    return command()

"""On the machine that a scheduler has chosen: a cell's process, and the signals that are for it."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hydra_plugins.vlmlab_pool_launcher._job import environment_of, start_process
from vlmlab.runs.files import read_json
from vlmlab.runs.progress import JOB
from vlmlab.runs.watchdog import NODE

POLL_S = 0.5
LEFT_OUT = ("SLURM_", "SUBMITIT_", "PMI", "SRUN_")
"""Beginnings of the variables from which Lightning would take the cell for one of several ranks."""


PORTS = (20_000, 30_000)


class CellCommand:
    """Runs one cell in a job; the scheduler's side of it, which is pickled there.

    A signal for the cell comes through ``job.json`` in its folder, where the launcher writes it. When a job is to be
    preempted, or has reached its time, the cell saves and ends, and the same command goes on in the next job.

    Args:
        command: the cell's command line.
        folder: the cell's.
        where: the folder that the command was given in.
        nodes: machines that the cell runs on.
    """

    def __init__(self, command: Sequence[str], folder: str, where: str, nodes: int = 1) -> None:
        self.command, self.folder, self.where, self.nodes = list(command), folder, where, nodes
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None}

    def __call__(self) -> int:
        """The exit code of the cell."""
        os.chdir(self.where)
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        machine, variables = _machine() if self.nodes > 1 else (0, {})
        self._log(f"on {socket.gethostname()}, process {os.getpid()}")
        log = f"log-{machine}.txt" if machine else "log.txt"
        self._process = start_process(self.folder, self.command, _variables() | variables, log)
        for number in before:
            signal.signal(number, self._hand_on)
        try:
            return self._waited(self._process)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _waited(self, process: subprocess.Popen[bytes]) -> int:
        sent = False
        while process.poll() is None:
            told = (read_json(Path(self.folder) / JOB) or {}).get("stop")
            if isinstance(told, int) and not sent:
                process.send_signal(told)
                sent = True
            time.sleep(POLL_S)
        return process.returncode

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def checkpoint(self) -> Any:
        """Called by submitit when the job is to be preempted or has reached its time: the cell saves, and goes on
        in the job's next run.
        """
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
        self._log("the job was preempted or has reached its time; the cell has saved and waits for its next run")
        return importlib.import_module("submitit").helpers.DelayedSubmission(self)

    def _log(self, text: str) -> None:
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, "log.txt"), "a", encoding="utf-8") as log:
            log.write(f"{text}\n")


def _machine() -> tuple[int, dict[str, str]]:
    """Which machine of a job on several this is, and the variables by which Lightning finds the others."""
    job = importlib.import_module("submitit").JobEnvironment()
    return job.node, among(job.node, job.hostnames[0], str(job.job_id))


def among(node: int, first: str, job: str) -> dict[str, str]:
    """The variables of a machine's process.

    Args:
        node: its number.
        first: name of the first machine.
        job: number of the job, of which the port is made.
    """
    port = PORTS[0] + int("".join(filter(str.isdigit, job)) or 0) % (PORTS[1] - PORTS[0])
    found = {NODE: str(node), "MASTER_ADDR": first, "MASTER_PORT": str(port)}
    return found | ({"RANK": str(node)} if node else {})  # not zero: what is said and written is rank zero's


def _variables() -> dict[str, str]:
    """Of the cell's process, which ends with this one."""
    environment = environment_of([], os.getpid())
    return {key: value for key, value in environment.items() if not key.startswith(LEFT_OUT)}

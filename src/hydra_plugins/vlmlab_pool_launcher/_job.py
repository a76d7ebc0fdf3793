"""Where cells run: what the pool asks of a place, and the place that is this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from vlmlab.runs.files import no_link
from vlmlab.runs.watchdog import LAUNCHER

OF_A_RANK = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE")
"""Variables that a launcher which is itself a rank must not hand on."""


@dataclass(frozen=True)
class Start:
    """A cell that is to start.

    Attributes:
        cell: which.
        command: its command line.
        slots: the GPUs it may use, or empty strings.
    """

    cell: Cell
    command: Sequence[str]
    slots: Sequence[str]


class Site(Protocol):
    """Where cells run."""

    def needs(self, cell: Cell) -> int:
        """Slots that a cell takes."""

    def start(self, starts: Sequence[Start]) -> None:
        """Start cells: each has its ``process`` then, or has failed."""

    def close(self) -> None:
        """All cells have ended."""


def environment_of(slots: Sequence[str], launcher: int) -> dict[str, str]:
    """The variables of a cell's process.

    Args:
        slots: GPUs it may use, or empty strings for those that are visible.
        launcher: the process that it must not outlive.
    """
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
    environment |= {LAUNCHER: str(launcher), "PYTHONUNBUFFERED": "1"}
    if any(slots):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(slots))
    return environment


def start_process(
    cell_folder: str, command: Sequence[str], environment: Mapping[str, str], log_name: str = "log.txt"
) -> subprocess.Popen[bytes]:
    """A cell's process, whose output goes to the end of this file in its folder."""
    os.makedirs(cell_folder, exist_ok=True)
    with open(os.path.join(cell_folder, log_name), "ab", opener=no_link) as log:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a terminal's Ctrl-C reaches the launcher only, which passes it on once
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a cell's process with the ranks and workers that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class LocalJob:
    """A cell that is a process of this machine."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def waits(self) -> str:
        """Nothing: it runs."""
        return ""

    def poll(self) -> int | None:
        """Its exit code."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Send the signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and its group."""
        kill_group(self.process)


class ThisMachine:
    """Cells as processes beside the launcher."""

    def needs(self, cell: Cell) -> int:
        """A slot for each device."""
        return cell.devices

    def start(self, starts: Sequence[Start]) -> None:
        """Start a process for each cell."""
        for one in starts:
            with one.cell.own_fault():
                environment = environment_of(one.slots, os.getpid())
                one.cell.process = LocalJob(start_process(str(one.cell.folder), one.command, environment))

    def close(self) -> None:
        """Nothing is left."""

"""Running cells as processes in slots, and stopping them with the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from hydra_plugins.vlmlab_pool_launcher._cells import ELSEWHERE, Cell
from vlmlab.contracts.stops import heeded
from vlmlab.runs.files import no_link
from vlmlab.runs.lock import is_locked
from vlmlab.runs.watchdog import LAUNCHER

POLL_S = 0.2
KILL_S = 60.0
"""How long a cell that was told to stop, for its timeout, may take to save."""


class Pool:
    """Runs cells until all of them have ended; one whose folder another process holds waits until that has ended.

    Args:
        slots: one entry per slot, the GPU it stands for or an empty string.
        command: the command line of a cell.
        timeout: seconds after which a cell is stopped, or None.
        show: called with all cells after every look at them.
    """

    def __init__(
        self,
        slots: Sequence[str],
        command: Callable[[Cell], list[str]],
        timeout: float | None,
        show: Callable[[Sequence[Cell]], None],
    ) -> None:
        self.free = list(slots)
        self.command = command
        self.timeout = timeout
        self.show = show
        self.signals: list[int] = []

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all waiting cells; the first signal of ``STOPS`` is passed on and waited for, the second kills."""
        with self._listening(cells):
            try:
                while any(cell.state in ("waiting", "running") for cell in cells):
                    self._start_waiting(cells)
                    for cell in cells:
                        self._look(cell)
                    self.show(cells)
                    time.sleep(POLL_S)
            finally:
                for cell in cells:
                    _kill_group(cell)

    def _start_waiting(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if cell.state != "waiting":
                continue
            if self.signals:
                cell.state = "interrupted"
            elif is_locked(cell.folder):
                cell.note = ELSEWHERE
            elif cell.note == ELSEWHERE and cell.settle_finished():
                continue
            elif len(self.free) >= cell.devices:
                self._start(cell)
            else:
                return  # cells start in order: one that needs two slots is not overtaken for ever

    def _start(self, cell: Cell) -> None:
        slots, rest = self.free[: cell.devices], self.free[cell.devices :]
        environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK")}
        environment |= {LAUNCHER: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        if any(slots):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(slots))
        with cell.own_fault():
            cell.folder.mkdir(parents=True, exist_ok=True)
            with open(cell.folder / "log.txt", "ab", opener=no_link) as log:
                cell.process = subprocess.Popen(
                    self.command(cell),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a terminal's Ctrl-C reaches the launcher only, which passes it on once
                )
            cell.slots, self.free = slots, rest
            cell.state, cell.note, cell.started = "running", "", time.monotonic()

    def _look(self, cell: Cell) -> None:
        if cell.state != "running" or cell.process is None:
            return
        cell.seconds = time.monotonic() - cell.started
        code = cell.process.poll()
        if code is not None:
            _kill_group(cell)  # ranks and workers it may have left
            cell.settle_ended(code, bool(self.signals))
            self.free += cell.slots
            cell.slots = []
        elif self.timeout is not None and cell.seconds > self.timeout:
            cell.note = f"stopped after hydra.launcher.timeout={self.timeout:g} seconds"
            cell.process.send_signal(signal.SIGKILL if cell.seconds > self.timeout + KILL_S else signal.SIGTERM)

    @contextlib.contextmanager
    def _listening(self, cells: Sequence[Cell]) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.signals.append(number)
            for cell in cells:
                if cell.state == "running" and cell.process is not None and cell.process.poll() is None:
                    if len(self.signals) == 1:
                        cell.process.send_signal(number)
                    else:
                        _kill_group(cell)

        before = {number: signal.signal(number, handle) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _kill_group(cell: Cell) -> None:
    if cell.process is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(cell.process.pid, signal.SIGKILL)

"""Running cells in slots, trying again those that failed, and stopping them with the launcher."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from hydra_plugins.vlmlab_pool_launcher._cells import ELSEWHERE, Cell
from hydra_plugins.vlmlab_pool_launcher._job import Site, Start, ThisMachine
from vlmlab.cli.entry import MISTAKE
from vlmlab.contracts.stops import handled_signals
from vlmlab.runs.lock import is_locked
from vlmlab.runs.progress import duration, last_sign

POLL_S = 0.2
KILL_S = 60.0
"""How long a cell that was told to stop, for its timeout, may take to save."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a cell may try.

    Attributes:
        timeout: seconds after which a cell is stopped, or None.
        retries: how often a cell that failed is tried again; a mistake in its configuration never is.
        backoff: seconds before the first of these times, twice as long before each further one.
        stalled: seconds without a sign of life after which a cell is said to make no progress, or None.
    """

    timeout: float | None = None
    retries: int = 0
    backoff: float = 10.0
    stalled: float | None = None


class Pool:
    """Runs cells until all of them have ended; one whose folder another process holds waits until that has ended.

    Args:
        slots: one entry per slot, the GPU it stands for or an empty string.
        command: the command line of a cell.
        patience: how long and how often a cell may try.
        show: called with all cells after every look at them.
        site: where they run; None: on this machine.
    """

    def __init__(
        self,
        slots: Sequence[str],
        command: Callable[[Cell], list[str]],
        patience: Patience | None,
        show: Callable[[Sequence[Cell]], None],
        site: Site | None = None,
    ) -> None:
        self.free = list(slots)
        self.command = command
        self.patience = patience or Patience()
        self.show = show
        self.site: Site = site or ThisMachine()
        self.signals: list[int] = []
        self.cells: Sequence[Cell] = []

    def run(self, cells: Sequence[Cell], more: Callable[[int], Sequence[Cell]] | None = None) -> None:
        """Run all waiting cells; the first signal of ``STOPS`` is passed on and waited for, the second kills.

        Args:
            cells: of the sweep.
            more: called after every look with the number of free slots; gives all cells there are by then, of which
                new ones begin to run. The pool ends when none is left and none comes.
        """
        self.cells = cells
        with self._listening():
            try:
                self._ask(more)
                while any(cell.state in ("waiting", "running") for cell in self.cells):
                    self._start_waiting(self.cells)
                    for cell in self.cells:
                        self._look(cell)
                    self._ask(more)
                    self.show(self.cells)
                    time.sleep(POLL_S)
            finally:
                for cell in self.cells:
                    if cell.process is not None:
                        cell.process.kill()
                self.site.close()

    def _ask(self, more: Callable[[int], Sequence[Cell]] | None) -> None:
        if more is not None:
            waiting = sum(cell.state == "waiting" for cell in self.cells)
            self.cells = more(0 if self.signals else max(0, len(self.free) - waiting))

    def _start_waiting(self, cells: Sequence[Cell]) -> None:
        """Start cells in order: one that needs two slots is not overtaken for ever."""
        starts: list[Start] = []
        for cell in cells:
            if cell.state != "waiting":
                continue
            needs = self.site.needs(cell)
            if self.signals:
                cell.state = "interrupted"
            elif is_locked(cell.folder):
                cell.note = ELSEWHERE
            elif time.monotonic() < cell.not_before or (cell.note == ELSEWHERE and cell.settle_finished()):
                continue
            elif len(self.free) >= needs:
                cell.slots, self.free = self.free[:needs], self.free[needs:]
                starts.append(Start(cell, self.command(cell), cell.slots))
            else:
                break
        self._start(starts)

    def _start(self, starts: Sequence[Start]) -> None:
        if not starts:
            return
        for one in starts:
            one.cell.process = None
        self.site.start(starts)
        for one in starts:
            if one.cell.process is None:  # its folder cannot be had
                self._give_back(one.cell)
            else:
                one.cell.state, one.cell.note, one.cell.started = "running", "", time.monotonic()

    def _give_back(self, cell: Cell) -> None:
        self.free += cell.slots
        cell.slots = []

    def _look(self, cell: Cell) -> None:
        if cell.state != "running" or cell.process is None:
            return
        if cell.process.waits():
            cell.started = time.monotonic()
        cell.seconds = time.monotonic() - cell.started
        code = cell.process.poll()
        if code is not None:
            cell.process.kill()  # ranks and workers it may have left
            cell.settle_ended(code, bool(self.signals))
            self._give_back(cell)
            self._try_again(cell, code)
            return
        self._stop_late(cell)
        self._notice_stalled(cell)

    def _stop_late(self, cell: Cell) -> None:
        timeout = self.patience.timeout
        if timeout is not None and cell.seconds > timeout and cell.process is not None:
            cell.note = f"stopped after hydra.launcher.timeout={timeout:g} seconds"
            if cell.seconds > timeout + KILL_S:
                cell.process.kill()
            else:
                cell.process.send(signal.SIGTERM)

    def _notice_stalled(self, cell: Cell) -> None:
        """A cell whose files have not changed for long is said to be; nothing is done to it."""
        limit = self.patience.stalled
        if limit is None or cell.process is None or cell.process.waits() or cell.seconds < limit:
            return
        sign = last_sign(cell.folder)
        still = sign is None or time.time() - sign > limit
        cell.stalled = f"no progress for more than {duration(limit)}" if still else ""

    def _try_again(self, cell: Cell, code: int) -> None:
        hopeless = cell.state != "failed" or code == MISTAKE or cell.given_up
        if hopeless or self.signals or cell.tries >= self.patience.retries:
            return
        wait = self.patience.backoff * 2**cell.tries
        cell.tries += 1
        cell.not_before = time.monotonic() + wait
        again = f"tried again in {duration(wait)}, {cell.tries} of {self.patience.retries}"
        cell.state, cell.note = "waiting", f"failed: {cell.note}; {again}"

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.signals.append(number)
            for cell in self.cells:
                if cell.state == "running" and cell.process is not None and cell.process.poll() is None:
                    if len(self.signals) == 1:
                        cell.process.send(number)
                    else:
                        cell.process.kill()

        before = {number: signal.signal(number, handle) for number in handled_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

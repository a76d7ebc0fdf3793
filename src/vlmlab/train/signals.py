"""Signals that end a run; during training they wait for the end of the step and for a checkpoint. Free of torch."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from vlmlab.contracts.stops import STOPS, handled_signals


class Interrupted(SystemExit):
    """A signal stopped the run; what was learnt is saved. Uncaught, it ends the process with the right exit code.

    Attributes:
        signum: the signal's number.
        code (SystemExit's): the exit code a shell expects: 128 plus the number (130 for SIGINT, 143 for SIGTERM,
            129 for SIGHUP, 138 for SIGUSR1 and 140 for SIGUSR2 on Linux).
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Signals:
    """Turns the first signal of ``STOPS`` into ``Interrupted``; further ones are ignored.

    Attributes:
        caught: number of the signal that came, or None.
        deferred: while True a signal is only noted; the code that set it asks `caught` and raises.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in STOPS}
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def install(self) -> None:
        """Take the signals (back from Lightning, whose handler talks to other ranks inside a signal and can hang)."""
        if threading.current_thread() is threading.main_thread():
            for number in handled_signals():
                signal.signal(number, self._note)

    def check(self) -> None:
        """Raise if a signal came.

        Raises:
            Interrupted: one did.
        """
        if self.caught is not None:
            raise Interrupted(self.caught)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught = number
            if not self.deferred:
                raise Interrupted(number)

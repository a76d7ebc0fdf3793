"""A further rank that ends before its time ends its run in one sentence, wherever rank zero is at that moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import lightning as L

from vlmlab.contracts.faults import AGAIN
from vlmlab.contracts.stops import STOPS
from vlmlab.contracts.terminal import tell
from vlmlab.runs.folder import RunFolder

GRACE_S = 2.0
"""How long rank zero may take to end by itself after a rank that had its own reason, which may be rank zero's too."""

FAILED = 1
"""Exit code of a run that failed."""


class Ranks(L.Callback):
    """Waits for the ranks that this process, rank zero, has started, each in a thread.

    A collective over the CPU's network says that a rank is lost, one over NCCL only after its timeout, and what
    computes or writes does not at all: Lightning, which looks at its ranks every 5 s, would kill it without a word.

    Args:
        folder: of the run, where its end is noted.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._speaks = threading.Lock()
        self._ended = threading.Event()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Right after they were started, which the first stage's trainer does; nothing where none was."""
        started = getattr(trainer.strategy.launcher, "procs", ())
        for rank, process in enumerate(started, 1):
            threading.Thread(target=self._wait, args=(rank, process), name=f"rank {rank}", daemon=True).start()

    def close(self) -> None:
        """From here on rank zero says itself how the run ended; does not return where that has been said."""
        with self._speaks:
            self._ended.set()

    def _wait(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        stopped = -code in STOPS  # the whole run may have been sent it
        if code == 0 or self._ended.wait(GRACE_S if code > 0 or stopped else 0.0):
            return
        with self._speaks:
            if not self._ended.is_set():
                self._end(lost(rank, code))

    def _end(self, sentence: str) -> None:
        """End this process, whose main thread may be in a call that nothing interrupts; its ranks follow it."""
        tell(f"error: {sentence}", sys.stderr)
        with contextlib.suppress(OSError):
            self.folder.end("failed", sentence)
        os._exit(FAILED)


def lost(rank: int, code: int) -> str:
    """What happened to a rank, by the code of its process."""
    if code >= 0:
        return f"rank {rank} of this run ended with exit code {code}; see what it said, {AGAIN}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"rank {rank} of this run was killed by {name}, as where memory is short; free some, {AGAIN}"

"""The signals that end a run after it has saved: of a terminal, of a shell that ends, of a cluster's scheduler."""

from __future__ import annotations

import signal

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM sends SIGUSR1 or SIGUSR2 before the time is over (``--signal``), others SIGTERM; SIGHUP is a lost terminal."""


def handled_signals() -> tuple[signal.Signals, ...]:
    """Those of them that count here: a SIGHUP that is ignored stays so, which is what ``nohup`` is for."""
    return tuple(n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN)

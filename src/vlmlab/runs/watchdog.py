"""A process that was started by another dies with it, whatever killed that one."""

from __future__ import annotations

import os
import signal
import threading
import time

LAUNCHER = "VLMLAB_LAUNCHER_PID"
"""Set by the pool launcher in its cells: the process id they live under."""

POLL_S = 0.5
GRACE_S = 20.0


NODE = "NODE_RANK"
"""Set in the processes of a run on several machines, as Lightning reads it: the number of the machine."""


def is_further_rank() -> bool:
    """Whether this process is of a run on several devices or machines, and not its rank zero, which answers for it."""
    return any(int(os.environ.get(name) or "0") > 0 for name in ("LOCAL_RANK", NODE))


def expected_parent() -> int | None:
    """The process this one must not outlive: rank zero for further ranks, the launcher for a cell, else None."""
    if is_further_rank():
        return os.getppid()
    launcher = os.environ.get(LAUNCHER)
    return int(launcher) if launcher else None


def die_with_parent(poll_s: float = POLL_S, grace_s: float = GRACE_S) -> threading.Thread | None:
    """Watch the parent in a thread: once it is gone, SIGTERM to oneself (which saves), `grace_s` later SIGKILL.

    Returns:
        The thread, or None where no launcher started this process.
    """
    parent = expected_parent()
    if parent is None:
        return None
    thread = threading.Thread(target=_watch, args=(parent, poll_s, grace_s), name="watchdog", daemon=True)
    thread.start()
    return thread


def _watch(parent: int, poll_s: float, grace_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(poll_s)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)

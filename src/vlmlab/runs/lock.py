"""One writer per run folder. The lock dies with its holder, however that dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
import weakref
from pathlib import Path

from vlmlab.contracts.errors import InUse, UserError, brief

ATTEMPTS = 5
PAUSE_S = 0.1


class FolderLock:
    """An exclusive ``flock`` on the file ``lock`` of a folder, which says who holds it.

    The kernel releases it when the holder ends, so a lock left by a killed process is not in the way. Forked children
    (data loading workers, ranks) give up their copy at once: they must not keep the folder locked after the holder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            InUse: another process holds it; the message says which.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{self.path} is not a file; remove it, and the same command goes on")
        for attempt in range(ATTEMPTS):  # somebody who only looks holds it for an instant
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == ATTEMPTS - 1:
                    os.close(descriptor)
                    raise InUse(
                        f"{self.path.parent} is in use by {self.holder()}; wait for it or stop it first"
                    ) from None
                time.sleep(PAUSE_S)
        with contextlib.suppress(OSError):  # a full disk holds the lock, if not its holder's name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference))

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> str:
        """Who took the lock last, in words."""
        try:
            said = self.path.read_text(encoding="utf-8", errors="replace").strip() if self.path.is_file() else ""
            return brief(" ".join(said.split()), 80) or "another process"
        except OSError:
            return "another process"


def _forget(reference: weakref.ref[FolderLock]) -> None:
    lock = reference()
    if lock is not None:
        with contextlib.suppress(OSError):
            lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the folder's lock."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False

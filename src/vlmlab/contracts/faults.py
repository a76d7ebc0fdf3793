"""What a machine refuses, as one sentence: room on a disk, memory, processes, a process that it killed.

Libraries say the same in many ways, some of them in words only; these are known here and nowhere else. Free of torch.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from vlmlab.contracts.errors import MachineError, brief

AGAIN = "then give the same command again"
"""What is saved is gone on from."""

NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "could not create a primitive",  # oneDNN, which does not say why; so says it where memory is short
    "could not create a memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "bad allocation",
)
NO_PROCESS = ("can't start new thread", "Resource temporarily unavailable")
LOST_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (exited unexpectedly|is killed by signal: \w+)")
LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection was likely closed",
    "Socket closed",
    "Broken pipe",
    "Timed out waiting",
    "recvValue failed",
    "sendBytes failed",
    "remote process exited",
)

ROOM = "make room there"
RIGHTS = "give this user the right to it, or mount its disk for writing"
GONE = "see to the disk or its mount"

REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: "raise the largest size of a file (ulimit -f)",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EROFS: RIGHTS,
    errno.EIO: GONE,
    errno.ESTALE: GONE,
    errno.ENOTCONN: GONE,
    errno.ENODEV: GONE,
    errno.ENXIO: GONE,
    errno.EMFILE: "raise the number of open files (ulimit -n), or lower trainer.workers",
    errno.ENFILE: "close other programs",
}
"""What helps where a file cannot be made, read or written, by the number of the error."""

UNNAMED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Of these it is known that a disk is meant where an error names no file."""


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out; the CPU's allocator and oneDNN say so in words only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a device
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, ImportError) and "failed to map segment" in str(error))
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY))
    )


def machine_error(error: BaseException, place: object = None) -> MachineError | None:
    """What the machine refused, if that is what an error or one of its causes is about.

    Args:
        error: what was raised.
        place: the folder that was written to, for errors that name no file.
    """
    for one in _causes(error):
        if isinstance(one, MachineError):
            return one
        sentence = _sentence(one, place)
        if sentence is not None:
            return MachineError(brief(f"{sentence}, {AGAIN}"))
    return None


def unusable(error: OSError, place: object = None) -> str | None:
    """The file that could not be made, read or written, why, and what helps; None where no file is meant."""
    file = error.filename if error.filename is not None else place if error.errno in UNNAMED else None
    if file is None:
        return None
    if error.errno == errno.ELOOP:
        return f"{file} is a link, and nothing is written through it; put a file in its place, or remove it"
    why = (error.strerror or type(error).__name__).lower()
    return f"{file}: {why}; {REMEDIES.get(error.errno or 0, 'check the path, its permissions and its disk')}"


def with_name(error: OSError, file: object) -> OSError:
    """The same error with a file's name, which writing into an open one does not give."""
    return error if error.filename is not None else OSError(error.errno, error.strerror, str(file))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _sentence(error: BaseException, place: object) -> str | None:
    if no_memory(error):
        return "out of memory; free some, take a smaller model or batch, or lower trainer.workers"
    if isinstance(error, OSError):
        if error.errno == errno.EAGAIN:
            return _no_process()
        return unusable(error, place or "the disk") if error.errno in REMEDIES else None
    if not isinstance(error, RuntimeError) and type(error).__name__ != "SafetensorError":
        return None
    return _of_words(" ".join(str(error).split()), place)


def _of_words(said: str, place: object) -> str | None:
    """What libraries say in words alone."""
    if any(word in said for word in NO_PROCESS):
        return _no_process()
    if lost := LOST_WORKER.search(said):
        how = lost.group(1).replace("is killed", "was killed")
        return f"a data worker {how}, as where memory is short; free some, or lower trainer.workers"
    if any(word in said for word in LOST_RANK):
        return "another rank of this run has ended, killed or out of memory; see what it said"
    number = re.search(r"(?:\(os error |: [A-Z][\w ]+ \()(\d+)\)", said)  # Rust's and torch's ways
    if number is None or int(number.group(1)) not in REMEDIES:
        return None
    shared = "torch_" in said or "shared memory" in said
    found = OSError(int(number.group(1)), os.strerror(int(number.group(1))))
    if shared:
        return f"/dev/shm: {found.strerror.lower()}; give it room, or set trainer.workers=0"  # type: ignore[union-attr]
    return unusable(found, place or "the disk")


def _no_process() -> str:
    return "no further process or thread can be started here; raise the limit (ulimit -u) or lower trainer.workers"

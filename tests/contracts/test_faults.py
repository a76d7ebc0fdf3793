"""What machines refuse, in the words of Python, torch, oneDNN, gloo and Rust, as one sentence each."""

from __future__ import annotations

import errno
import re

import pytest
import torch
from safetensors import SafetensorError

from vlmlab.contracts.errors import MachineError
from vlmlab.contracts.faults import machine_error, no_memory, unusable

WORKER = "DataLoader worker (pid 31) is killed by signal: Killed. "
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40611"
SHARED = "unable to write to file </torch_12_34_0>: No space left on device (28)"
SAID: list[tuple[BaseException, str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), "run: no space left on device; make room there, then give the"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "a/b: disk quota exceeded; make room there"),
    (OSError(errno.EFBIG, "File too large", "a/b"), "a/b: file too large; raise the largest size of a file"),
    (OSError(errno.EACCES, "Permission denied", "a/b"), "a/b: permission denied; give this user the right"),
    (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: read-only file system; give this user the right"),
    (OSError(errno.ESTALE, "Stale file handle", "a/b"), "a/b: stale file handle; see to the disk or its mount"),
    (OSError(errno.EMFILE, "Too many open files"), r"run: too many open files; raise the number .* \(ulimit -n\)"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; free some"),
    (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "no further process or thread can be started here"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "run: no space left on device; make room"),
    (SafetensorError("I/O error: File too large (os error 27)"), "run: file too large; raise"),
    (RuntimeError(SHARED), "/dev/shm: no space left on device; give it room, or set trainer.workers=0"),
    (MemoryError("Unable to allocate 8 GiB"), "out of memory; free some"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; free some"),
    (RuntimeError("could not create a primitive"), "out of memory; free some"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; free some"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory; free some"),
    (RuntimeError("can't start new thread"), "no further process or thread can be started here"),
    (RuntimeError(WORKER), "a data worker was killed by signal: Killed, as where memory is short; free some, or lower"),
    (RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), "a data worker exited unexpectedly"),
    (RuntimeError(GLOO), "another rank of this run has ended, killed or out of memory; see what it said"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words"), SAID, ids=[str(error)[:30] for error, _ in SAID])
def test_each_is_one_sentence_with_a_remedy(error: BaseException, words: str) -> None:
    said = machine_error(error, "run")
    assert said is not None and re.match(words, str(said)), said
    assert str(said).endswith(", then give the same command again") and len(str(said)) <= 300
    assert no_memory(error) == words.startswith("out of memory")
    wrapped = ValueError("in a part")
    wrapped.__cause__ = error
    assert str(machine_error(wrapped, "run")) == str(said)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("index out of range (28)"),
        ValueError("could not create a primitive"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        SafetensorError("Error while deserializing header: invalid JSON (os error 2)"),
    ],
    ids=str,
)
def test_others_are_not_the_machines(error: BaseException) -> None:
    assert machine_error(error, "run") is None


def test_a_long_path_still_leaves_the_reason_and_the_remedy() -> None:
    said = str(machine_error(OSError(errno.ENOSPC, "No space left on device", "/a" * 400)))
    assert len(said) <= 300 and "no space left" in said and said.endswith("same command again")
    assert isinstance(machine_error(MachineError("known")), MachineError)


def test_a_file_is_named_where_there_is_one() -> None:
    assert unusable(FileNotFoundError(errno.ENOENT, "No such file or directory", "a")) == (
        "a: no such file or directory; check the path, its permissions and its disk"
    )
    assert unusable(OSError(errno.ENOSPC, "No space left on device")) is None
    assert unusable(BrokenPipeError(errno.EPIPE, "Broken pipe"), "a") is None

"""Records of one length under keys, in a folder that any number of processes read and write at once.

Every writer has two files of its own and only appends to them, so that no writer waits for another and a writer that
dies does no harm. ``<writer>.data`` holds records of one length, the k-th at k x length; ``<writer>.index`` a row per
record with its key and a checksum over key and record, written after it. What was torn, or damaged later, does not
fit its checksum: it is struck out of the index and never handed on. Two writers may keep the same key; they keep the
same bytes.

Neither a file per record (558,000 images are more files than a cluster grants, and each costs a look-up on a network
disk) nor sqlite (one writer at a time, every record written twice, and its log does not work on network disks).

A process that uses a folder holds a shared lock on its file ``lock``, which dies with the process; the time of that
file says when the folder was used last. ``make_room`` removes only folders that are not in use. Free of torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROW = struct.Struct("<32sI4x")
"""A row of an index: key and checksum."""

STRUCK = bytes(ROW.size)
SUFFIX = ".features"
"""Of every folder of records; nothing else beside them is counted or removed."""

GONE = ".gone-"


@dataclass(frozen=True)
class Place:
    """Where a record is: its writer's data file, its number there, and its checksum."""

    data: Path
    number: int
    check: int


@dataclass
class Writer:
    """The two files that a process appends to, and the records written so far."""

    process: int
    path: Path
    data: int
    index: int
    rows: int = 0


class Shelf:
    """One folder of records. Nothing is raised for what the disk does: `trouble` says why nothing more is kept.

    Args:
        folder: made if missing.
        length: bytes of a record.
        about: what the records are, written into the folder for people.

    Attributes:
        trouble: why it cannot be written to, in a few words; empty while it can.
        damaged: records that did not fit their checksum.
    """

    def __init__(self, folder: Path, length: int, about: str = "") -> None:
        self.folder, self.length = folder, length
        self.trouble = ""
        self.damaged = 0
        self._places: dict[bytes, Place] = {}
        self._known: dict[str, int] = {}  # index file -> rows read
        self._writer: Writer | None = None
        self._lock: int | None = None
        try:
            self._lock = _hold(folder)
            (folder / "about.json").write_text(about + "\n", encoding="utf-8")
        except OSError as error:
            self.trouble = _reason(error)
        self.refresh()

    def read(self, key: bytes, into: memoryview) -> bool:
        """Fill `into` with the record of a key; False where there is none that is whole."""
        place = self._places.get(key)
        if place is None:
            return False
        try:
            with open(place.data, "rb", buffering=0) as file:
                file.seek(place.number * self.length)
                got = file.readinto(into)
        except OSError:  # somebody has emptied the folder
            del self._places[key]
            return False
        if got == self.length and _check(key, into) == place.check:
            return True
        self._strike(key, place)
        return False

    def write(self, key: bytes, record: memoryview) -> bool:
        """Keep a record; False where it could not be."""
        if self.trouble:
            return False
        try:
            own = self._own()
            _write_all(own.data, record, own.rows * self.length)
            check = _check(key, record)
            _write_all(own.index, memoryview(ROW.pack(key, check)), own.rows * ROW.size)
        except OSError as error:  # the disk is full, most likely
            self.trouble = _reason(error)
            return False
        self._places[key] = Place(own.path, own.rows, check)
        own.rows += 1
        return True

    def refresh(self) -> None:
        """Learn what others have written since."""
        try:
            found = [entry for entry in os.scandir(self.folder) if entry.name.endswith(".index")]
            files = [(entry.name, entry.stat().st_size // ROW.size) for entry in found]
        except OSError:
            return
        for name, rows in files:
            before = self._known.get(name, 0)
            if rows > before:
                with contextlib.suppress(OSError):
                    self._learn(name, before, rows)
                self._known[name] = rows

    def close(self) -> None:
        """Let the folder go."""
        if self._writer is not None:
            os.close(self._writer.data)
            os.close(self._writer.index)
        if self._lock is not None:
            os.close(self._lock)
        self._writer = self._lock = None

    def _learn(self, name: str, first: int, end: int) -> None:
        path = self.folder / name
        with path.open("rb") as file:
            file.seek(first * ROW.size)
            rows = file.read((end - first) * ROW.size)
        data = path.with_suffix(".data")
        for number, (key, check) in enumerate(ROW.iter_unpack(rows[: len(rows) // ROW.size * ROW.size]), first):
            if key != STRUCK[:32]:
                self._places.setdefault(key, Place(data, number, check))

    def _strike(self, key: bytes, place: Place) -> None:
        """Take a damaged record out of the index, for everybody."""
        del self._places[key]
        self.damaged += 1
        with contextlib.suppress(OSError), open(place.data.with_suffix(".index"), "r+b") as file:
            file.seek(place.number * ROW.size)
            file.write(STRUCK)

    def _own(self) -> Writer:
        """The files of the present process; one that was forked begins new ones."""
        if self._writer is None or self._writer.process != os.getpid():
            path = self.folder / f"{secrets.token_hex(8)}.data"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            data, index = (os.open(file, flags, 0o644) for file in (path, path.with_suffix(".index")))
            self._writer = Writer(os.getpid(), path, data, index)
        return self._writer


def make_room(root: Path, bytes_needed: int, limit: int) -> bool:
    """Whether so many bytes more stay within the limit on all folders below `root`.

    Where they do not, folders that are not in use are removed, those used longest ago first.
    """
    free = limit - bytes_needed - sum(size for _, size in _sizes(root))
    if free >= 0:
        return True
    for folder, size in sorted(_sizes(root), key=lambda item: _last_use(item[0])):
        if free < 0 and _remove(folder):
            free += size
    return free >= 0


def _sizes(root: Path) -> Iterator[tuple[Path, int]]:
    """Every folder below `root` with the bytes in it."""
    with contextlib.suppress(OSError):
        for folder in sorted(root.glob(f"*{SUFFIX}")):  # also hidden ones
            with contextlib.suppress(OSError):
                yield folder, sum(entry.stat().st_size for entry in os.scandir(folder))


def _last_use(folder: Path) -> float:
    try:
        return (folder / "lock").stat().st_mtime
    except OSError:  # half removed
        return 0.0


def _remove(folder: Path) -> bool:
    """Remove a folder of records unless somebody holds it."""
    if not folder.name.startswith(GONE):
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = folder.rename(folder.with_name(f"{GONE}{secrets.token_hex(8)}{SUFFIX}"))
        except OSError:
            return False
        finally:
            os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _hold(folder: Path) -> int:
    """Make the folder and lock it against removal; also notes the time."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(OSError):  # a disk without locks: anyone who removes meets readers that compute anew
            fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
                os.utime(lock)
                return lock
        os.close(lock)  # the folder was removed in between


def _check(key: bytes, record: memoryview) -> int:
    return zlib.crc32(record, zlib.crc32(key))


def _write_all(file: int, content: memoryview, place: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], place + done)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__

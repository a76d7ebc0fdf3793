"""Small files that are never half there: written beside their place and moved into it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmlab.contracts.faults import machine_error, with_name


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """The place of a new file beside a file's own, into which it is moved at once when all of it is written.

    What was there stays until then, and what a disk did not take whole is removed.

    Args:
        path: the file.
        durable: wait until it is on the disk.

    Raises:
        OSError: naming the file, also where writing into an open one names none.
        MachineError: a library has said so in words of its own.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)  # of a writer that was killed, or a link that somebody has laid
        yield new
        if durable:
            _sync(new)
        os.replace(new, path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            meant = error.filename in (None, str(new)) or error.filename2 == str(new)
            raise OSError(error.errno, error.strerror, str(path)) if meant else error from error.__cause__
        if (refused := machine_error(error, path)) is not None:
            raise refused from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str, durable: bool = False) -> None:
    """Replace a file by this text at once; `durable` also waits until it is on the disk. Errors as ``replacing``."""
    with replacing(path, durable) as new:
        new.write_text(text, encoding="utf-8")


def write_over(path: Path, text: str) -> None:
    """Write a short text over a file in its place, where a full disk has no room for a second one; or leave it."""
    with suppress(OSError), path.open("r+b", buffering=0) as file:
        file.write(text.encode().ljust(path.stat().st_size))


def append_line(path: Path, line: str) -> None:
    """Add a line to a file.

    Raises:
        OSError: naming the file, which then ends where it ended before.
    """
    data = memoryview(f"{line}\n".encode())
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk that becomes full takes a part first
                data = data[file.write(data) :]
        except OSError as error:
            with suppress(OSError):
                file.truncate(end)
            raise with_name(error, path) from error


def share(*paths: Path) -> None:
    """Let whoever may read the folder read these files in it: safetensors leaves them to their owner alone."""
    for path in paths:
        with suppress(PermissionError):  # some mounted file systems give all files the rights of the mount
            path.chmod(path.parent.stat().st_mode & 0o666)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: it knows no NaN and no infinity, which become the words "nan", "inf", "-inf"."""
    return json.dumps(_worded(value), indent=indent, default=str, allow_nan=False)


def _worded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {_worded(key): _worded(item) for key, item in value.items()}
    return [_worded(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Replace a JSON file at once; see ``to_json``."""
    write_atomic(path, to_json(value, indent=2) + "\n", durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line (the writer was killed) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # words may hold other ends of lines
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def is_free(folder: Path) -> bool:
    """Whether nothing is there yet, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))

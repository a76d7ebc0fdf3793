"""Files that are never half there: written beside their place, moved into it, and through no link of others."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.faults import machine_error, with_name

NEW = ".new"
"""End of the name of a file that is being written."""

OWN_FOLDERS = ("stages", "stages/*", "predictions", "evaluate", "evaluate/predictions", "towers", "wandb")
"""Folders inside a run's that runs write into."""


ADDED_TO = ("skipped.jsonl", "evaluate/skipped.jsonl")
"""Files inside a run's that rows are added to while it is scored."""


def new_file(path: Path) -> Path:
    """Where the next content of a file is written, beside it; nothing is there."""
    new = path.with_name(f".{path.name}.{threading.get_native_id()}{NEW}")
    new.unlink(missing_ok=True)
    return new


@contextmanager
def placing(path: Path, durable: bool = False) -> Iterator[Path]:
    """The place of a new file beside a file's own, into which it is moved at once when all of it is written.

    What was there stays until then, and what a disk did not take whole is removed.

    Args:
        path: the file; a link there is replaced itself.
        durable: wait until it is on the disk.

    Raises:
        OSError: naming the file, also where writing into an open one names none.
        MachineError: a library has said so in words of its own.
    """
    new = new_file(path)
    try:
        yield new
        if durable:
            sync_folder(new)
        os.replace(new, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            meant = error.filename in (None, str(new)) or error.filename2 == str(new)
            raise OSError(error.errno, error.strerror, str(path)) if meant else error from error.__cause__
        if (refused := machine_error(error, path)) is not None:
            raise refused from error
        raise


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` at once when this ends; all else as ``placing``."""
    with placing(path, durable) as new:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(handle, "wb") as file:
            yield file


def write_atomic(path: Path, text: str, durable: bool = False) -> None:
    """Replace a file by this text at once; `durable` also waits until it is on the disk. Errors as ``placing``."""
    with replacing(path, durable) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_over(path: Path, text: str) -> None:
    """Write a short text over a file in its place, where a full disk has no room for a second one; or leave it."""
    with suppress(OSError), open(path, "r+b", buffering=0, opener=no_link) as file:
        file.write(text.encode("utf-8", "backslashreplace").ljust(path.stat().st_size))


def append(path: Path, text: str) -> None:
    """Add a text to a file's end, whole or not at all.

    Raises:
        OSError: a link is in its place, or the disk does not take it; names the file, which ends where it ended before.
    """
    data = text.encode("utf-8", "backslashreplace")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    done = 0
    try:
        while done < len(data):  # in one write but on a disk that becomes full, which takes a part first
            done += os.write(handle, data[done:])
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(handle, os.fstat(handle).st_size - done)
        raise with_name(error, path) from error
    finally:
        os.close(handle)


def no_link(path: str, flags: int) -> int:
    """An opener for ``open`` that refuses a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process left of files it was writing into a run folder; its lock must be held."""
    for place in (folder, *(p for name in OWN_FOLDERS for p in folder.glob(name))):
        for left in place.glob(f".*{NEW}"):
            if left.is_file() or left.is_symlink():
                left.unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """Refuse to write into a run folder whose own places are links: its author chose where they lead.

    Raises:
        UserError: naming the link.
    """
    for name in (*OWN_FOLDERS, *ADDED_TO):
        for place in folder.glob(name):
            if place.is_symlink():
                raise UserError(f"{place} is a link, and nothing is written through it; remove it")


def refuse_no_file(path: Path) -> None:
    """Refuse the place of a file that others than this module write, where a link, a pipe or a folder is.

    Raises:
        UserError: naming it.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{path} is a link or not a file, and is not written into; remove it")


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries, or a file's content, are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def share(*paths: Path) -> None:
    """Make these files as readable as the folder: safetensors makes them readable to their owner alone."""
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


class _Plain(yaml.SafeLoader):
    """Without aliases, of which a few lines can stand for gigabytes, or for a value inside itself."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "it has an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """What a YAML file of plain values says.

    Raises:
        yaml.YAMLError, UnicodeDecodeError, RecursionError: it is not such a file.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line (the writer was killed) is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # words may hold other ends of lines
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def check_place(path: Path, key: str) -> None:
    """Refuse a place where no file can be written, before the work that it is to hold.

    Raises:
        UserError: its folder is not there, or it is a folder itself; names the key that gave it.
    """
    if not path.parent.is_dir():
        raise UserError(f"{key}={path}: there is no folder {path.parent}; make it, or give another place")
    if path.is_dir():
        raise UserError(f"{key}={path} is a folder; give the name of a file in it")


def is_free(folder: Path) -> bool:
    """Whether nothing is there yet, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))

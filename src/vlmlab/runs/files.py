"""Small files that are never half there: written beside their place and moved into it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import UserError


def write_atomic(path: Path, text: str, durable: bool = False) -> None:
    """Replace a file by this text at once; `durable` also waits until it is on the disk."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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

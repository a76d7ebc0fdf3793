"""Where a run's first weights come from, a finished stage of an earlier run (``init_from``), and whether that changed.

The run keeps the source's file until its own first stage is finished, and what it was in ``origin.json`` for good: from
its first step on it does not need the source any more. Free of torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from vlmlab.contracts.errors import CheckpointError, UserError, listed
from vlmlab.runs.files import placing, read_json, read_yaml, write_json

KEY = "init_from"
FILE = "origin.json"
"""In the run folder: ``{file, sha256, bytes, time_ns}`` of the source as it was when the run began."""

WEIGHTS = "model.safetensors"
KEPT = "stages/initial.safetensors"
"""The source's weights in the run folder, while the first stage is not finished."""


def find_origin(value: str) -> Path:
    """The file of weights that ``init_from=<run folder>[/<stage>]`` means: of the run's last stage, or the named one.

    Raises:
        UserError: there is no such run or stage, or that stage is not finished.
    """
    given = Path(str(value)).expanduser()
    run, stage = (given, None) if (given / "config.yaml").is_file() else (given.parent, given.name)
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{KEY}={value} is neither a run folder nor a stage of one; give the folder that training printed."
        )
    files = {file.parent.name.partition("_")[2]: file for file in _weights_of(run)}
    there = listed(files, 80)
    name = _last_stage(run) if stage is None else stage
    if name not in files:
        raise UserError(
            f"{KEY}={value}: the stage {name} of {run} is not finished (finished: {there}); give one that is, as in "
            f"{KEY}={run}/<stage>, or finish that run first."
        )
    return files[name]


def _weights_of(run: Path) -> list[Path]:
    return sorted(file for file in (run / "stages").glob(f"*/{WEIGHTS}") if file.is_file())


def check_origin(folder: Path, value: str | None, fresh: bool = False) -> None:
    """Refuse a source that is not there when it is needed, or is no longer what this run began with.

    Args:
        folder: the run folder; nothing need be there yet.
        value: ``init_from``.
        fresh: whether the run begins again anyhow.

    Raises:
        UserError: the source is missing and this run has not begun, or its weights have changed since it did.
    """
    if value is None:
        return
    known = None if fresh else read_json(folder / FILE)
    if known is None:
        find_origin(value)
    elif (problem := changed_origin(folder, value)) is not None:
        raise UserError(problem)


def changed_origin(folder: Path, value: str | None) -> str | None:
    """Why the source is not what this run began with, in one sentence; None also where the source is gone."""
    known = read_json(folder / FILE)
    if value is None or known is None:
        return None
    try:
        file = find_origin(value)
    except UserError:  # it has been deleted; the run has what it needs
        return None
    if _size_and_time(file) == (known.get("bytes"), known.get("time_ns")):
        return None
    now, before = file_hash(file), str(known.get("sha256"))
    if now == before:
        return None
    return (
        f"{KEY}={value} has other weights now (sha256 {now[:12]}) than this run began with ({before[:12]}); give it "
        "the old ones back, choose another name=..., or train again with fresh=true."
    )


def take_origin(folder: Path, value: str) -> Path:
    """A copy of the source's weights inside the run folder, made at the run's beginning; noted in ``origin.json``.

    Raises:
        UserError: as `check_origin`.
    """
    check_origin(folder, value)
    kept, known = folder / KEPT, read_json(folder / FILE)
    if known is None and os.path.lexists(folder / FILE):
        raise CheckpointError(
            f"{folder / FILE} is damaged; delete it, and the run goes on from {KEY}={value} as that is now"
        )
    if known is None or not kept.is_file():
        file = find_origin(value)
        kept.parent.mkdir(parents=True, exist_ok=True)
        put_file(file, kept)
        size, time = _size_and_time(file)
        facts = {"file": str(file), "sha256": file_hash(kept), "bytes": size, "time_ns": time}
        if known is not None and known.get("sha256") != facts["sha256"]:
            raise CheckpointError(f"{kept} is missing and {KEY}={value} has other weights now; train with fresh=true.")
        write_json(folder / FILE, facts, durable=True)
    return kept


def kept_origin(folder: Path, value: str) -> Path:
    """The copy in the run folder, or the source itself where the first rank has not made one yet."""
    kept = folder / KEPT
    return kept if kept.is_file() else find_origin(value)


def drop_origin(folder: Path) -> None:
    """Remove the copy: the first stage's own file has all of it."""
    (folder / KEPT).unlink(missing_ok=True)


def put_file(source: Path, target: Path) -> None:
    """Have a file in a second place at once: as a hard link where the disk knows them, otherwise as a copy."""
    with placing(target, durable=True) as new:
        try:
            os.link(source, new)
        except OSError:
            shutil.copyfile(source, new)
    new.unlink(missing_ok=True)  # replacing a link by another to the same file does nothing at all


def file_hash(file: Path) -> str:
    """sha256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _last_stage(run: Path) -> str:
    try:
        config: Any = read_yaml(run / "config.yaml")
        return str(list(config["recipe"]["stages"])[-1])
    except (OSError, ValueError, yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{KEY}: {run / 'config.yaml'} is damaged; name the stage, as in {KEY}={run}/<stage>."
        ) from error

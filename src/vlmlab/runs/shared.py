"""Finished stages that runs have in common: each is trained by one of them and taken by the others, whole and checked.

``<shelf>/<address>/`` is one stage, addressed by all that its weights depend on:

    lock         held by the run that trains it or takes it; it dies with its process
    about.json   what the address is made of, for people
    entry/       model.safetensors, stage.json, metrics.jsonl, skipped.jsonl, entry.json; renamed into place when whole
    cells/       an empty file for every run that has it, named after its folder

Free of torch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import UserError
from vlmlab.runs.files import append, read_json, read_rows, sync_folder, write_atomic, write_json
from vlmlab.runs.folder import CELL
from vlmlab.runs.lock import FolderLock
from vlmlab.runs.origin import WEIGHTS, file_hash, put_file

KEY = "share_stages"
SHELF = "shared"
"""In the folder of a sweep."""

FACTS = "stage.json"
METRICS, SKIPPED, ENTRY = "metrics.jsonl", "skipped.jsonl", "entry.json"
SEVERAL_RANKS = "several ranks would have to agree"

POLL_S = 0.5
SAY_EVERY_S = 60.0


@dataclass(frozen=True)
class Shared:
    """A stage that somebody has trained.

    Attributes:
        weights: its file.
        facts: its ``stage.json``.
        rows: its rows of ``metrics.jsonl``.
        skipped: rows of ``skipped.jsonl`` that its data have.
    """

    weights: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    skipped: list[dict[str, Any]]


def shelf_of(value: Any, folder: Path) -> Path | None:
    """The shelf that a run uses; None: it trains all its stages by itself.

    Args:
        value: ``share_stages``: auto (the cells of a sweep among each other), false, or a folder, for any run.
        folder: the run folder.

    Raises:
        UserError: another value.
    """
    if value is None or value is False:
        return None
    if not isinstance(value, str) or not value:
        raise UserError(f"{KEY}={value} is not possible; give auto, false, or a folder that runs share stages in.")
    if value != "auto":
        return Path(value).expanduser()
    shelf = folder.parent / SHELF
    if shelf.is_symlink():
        raise UserError(f"{shelf} is a link, and nothing is written through it; put a folder there, or {KEY}=false")
    return shelf if (folder / CELL).is_file() else None


def unshared(config: Mapping[str, Any]) -> str:
    """Why a run's stages are not another run's, or the two cannot agree upon them; empty: they may be shared.

    Args:
        config: the plain configuration.
    """
    if any((config.get("debug") or {}).values()):
        return "debug is on"
    if config.get("seed") is None:
        return "there is no seed"
    if (config.get("evaluation") or {}).get("save_best"):
        return "evaluation.save_best keeps more of a stage than its last weights"
    if config["recipe"].get("finish"):
        return "the recipe ends in recipe.finish, which reads its models"
    if config.get("fresh"):
        return "fresh=true trains again"
    if config["trainer"]["devices"] != 1 or config["trainer"].get("nodes", 1) != 1:
        return SEVERAL_RANKS
    return ""


class Place:
    """One stage's place on the shelf, while this process holds its lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def look(self) -> Shared | None:
        """What is there, if it is whole; what is damaged is removed."""
        entry = self.folder / "entry"
        listed, facts = read_json(entry / ENTRY), read_json(entry / FACTS)
        weights = entry / WEIGHTS
        if listed and facts is not None and weights.is_file() and file_hash(weights) == listed.get(WEIGHTS):
            return Shared(weights, facts, read_rows(entry / METRICS), read_rows(entry / SKIPPED))
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def put(self, shared: Shared, about: Mapping[str, Any]) -> None:
        """Put a finished stage there, at once.

        Raises:
            OSError: the disk does not take it; nothing is there then.
        """
        new = self.folder / ".new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        put_file(shared.weights, new / WEIGHTS)
        write_json(new / FACTS, shared.facts, durable=True)
        for name, rows in ((METRICS, shared.rows), (SKIPPED, shared.skipped)):
            write_atomic(new / name, "".join(json.dumps(row) + "\n" for row in rows), durable=True)
        write_json(new / ENTRY, {WEIGHTS: file_hash(new / WEIGHTS)}, durable=True)
        write_json(self.folder / "about.json", about)
        sync_folder(new)
        os.rename(new, self.folder / "entry")
        sync_folder(self.folder)

    def sign(self, run: Path) -> None:
        """Note that a run has this stage."""
        cells = self.folder / "cells"
        cells.mkdir(exist_ok=True)
        append(cells / run.resolve().name, "")


@contextmanager
def held(shelf: Path, address: str, say: Callable[[str], None]) -> Iterator[Place]:
    """A stage's place, for this process alone; waits as long as another one that holds it lives.

    Args:
        shelf: the folder.
        address: of the stage.
        say: takes a line about the waiting, at its beginning and every minute.

    Raises:
        OSError: the folder cannot be made or locked.
    """
    folder = shelf / address
    folder.mkdir(parents=True, exist_ok=True)
    lock, said = FolderLock(folder), float("-inf")
    while True:
        try:
            lock.acquire()
            break
        except UserError:  # somebody has it
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                say(f"the same stage is being trained by {lock.holder()}; waiting for it ({folder})")
            time.sleep(POLL_S)
    try:
        yield Place(folder)
    finally:
        lock.release()


def sharing_note(sweep: Path) -> str | None:
    """How many stages of a sweep were trained once for several cells, in one sentence; None: none."""
    groups = [_cells(place) for place in sorted((sweep / SHELF).glob("*")) if (place / "entry" / ENTRY).is_file()]
    several = [cells for cells in groups if len(cells) > 1]
    if not several:
        return None
    stages = f"{len(several)} stage{'' if len(several) == 1 else 's'}"
    once = "was" if len(several) == 1 else "were"
    return (
        f"{stages} {once} trained once for {len(set().union(*several))} cells; seconds are what a stage took where it "
        "was trained."
    )


def _cells(place: Path) -> set[str]:
    cells = place / "cells"
    return {path.name for path in cells.iterdir()} if cells.is_dir() else set()

"""Rows that cannot be used: collected up to a share, replaced by the next usable row, and written down.

What replaces a bad row depends on the files and its number alone, never on what has been met before. So ranks, workers
and a run that goes on after a stop all see the same samples without having to agree.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import LONGEST, DataError, brief
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.data.fingerprint import Facts, source_fingerprint
from vlmlab.data.sampler import Order, block_of

FILE = "skipped.jsonl"
"""In the run folder: one row per skipped sample, ``{data, id, reason}``."""

SHOWN = 20
"""So many bad rows and fewer are not worth a file before a run has begun."""

MOST_GROUPS = 3
"""Reasons named in a message; the file and ``vlmlab inspect`` have them all."""

_PARTICULAR = re.compile(r"'[^']*[/\\\d.][^']*'|\([^)]*\)|\S*[/\\\d]\S*")
"""What is particular to a row in the words about it: places, names of files, numbers, what is in brackets."""

INSIST = 1000
"""Bad rows in a row after which the search for a usable one is given up."""

Check = Callable[[Sample], Any]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is left out: its id, and why in one sentence."""

    id: str
    reason: str


class TooManyBad(DataError):
    """More rows cannot be used than the configuration allows.

    Attributes:
        skipped: all of them.
        listed: whether they are many and the list is worth keeping; where most rows are bad, it is not the rows that
            are wrong (but, say, the image folder).
    """

    def __init__(self, message: str, skipped: Sequence[Skipped], total: float) -> None:
        super().__init__(message)
        self.skipped = list(skipped)
        self.listed = SHOWN < len(skipped) < total / 2


def check_share(skipped: Sequence[Skipped], total: float, limit: float, where: str) -> None:
    """Raises TooManyBad, naming the rows, where more than `limit` of `total` are bad."""
    if len(skipped) <= limit * total:
        return
    groups = grouped(skipped)
    begin = f"{brief(where, 70)}: {len(skipped)} of {total:g} rows cannot be used, more than data.max_bad_fraction="
    begin += f"{limit:g} allows; repair or remove them (vlmlab inspect lists all): "
    shown = groups if len(groups) <= MOST_GROUPS else groups[: MOST_GROUPS - 1]
    rest = f"; {len(groups) - len(shown)} other reasons" if len(shown) < len(groups) else ""
    room = (LONGEST - len(begin) - len(rest)) // len(shown) - 2
    lines = [brief(group.line(remedy=len(groups) == 1), room) for group in shown]
    raise TooManyBad(begin + "; ".join(lines) + rest, skipped, total)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are left out for one reason.

    Attributes:
        count: how many.
        first: the id of the first of them.
        reason: why it is left out, in one sentence.
    """

    count: int
    first: str
    reason: str

    def line(self, remedy: bool = False) -> str:
        """How many, the first, and what is wrong with it, without the folder of its file."""
        name = self.first if len(self.first) <= 40 else f"{self.first[:37]}..."
        wrong = re.sub(r"^\S*/", "", self.reason if remedy else _problem(self.reason))
        return f"{name}: {wrong}" if self.count == 1 else f"{self.count} like {name}: {wrong}"


def _problem(reason: str) -> str:
    return reason.rpartition("; ")[0] or reason


def grouped(skipped: Sequence[Skipped]) -> list[Group]:
    """The bad rows by reason, the most frequent first; what is particular to a row makes no other reason."""
    found: dict[str, list[Skipped]] = {}
    for one in skipped:
        found.setdefault(_PARTICULAR.sub("..", _problem(one.reason)), []).append(one)
    groups = [Group(len(rows), rows[0].id, rows[0].reason) for rows in found.values()]
    return sorted(groups, key=lambda group: -group.count)


def label(source: SampleSource, index: int) -> str:
    """The id of a sample that may be impossible to load; its number where the source gives no other."""
    named = getattr(source, "label", None)
    return str(named(index)) if named is not None else str(index)


def next_usable(source: SampleSource, index: int, check: Check | None, skipped: list[Skipped]) -> Sample:
    """The sample `index`, or the first usable one after it (the first follows the last); a pure function.

    Args:
        source: the samples.
        index: number of the sample that is wanted.
        check: raises DataError for a sample that cannot be used although it can be loaded (too long, no answer).
        skipped: the bad rows on the way are added here.

    Raises:
        TooManyBad: `INSIST` rows, or all of them, are bad.
    """
    size = len(source)
    bad: list[Skipped] = []
    for place in range(index, index + min(size, INSIST)):
        try:
            sample = source[place % size]
            if check is not None:
                check(sample)
            skipped += bad
            return sample
        except DataError as error:
            bad.append(Skipped(label(source, place % size), str(error)))
    skipped += bad
    check_share(bad, len(bad), 0.0, f"{len(bad)} rows from {bad[0].id} on")
    raise AssertionError("unreachable")


class Replaced:
    """A source whose bad rows are replaced by the next usable ones.

    Args:
        source: the samples.
        check: see `next_usable`.

    Attributes:
        skipped: the bad rows met so far.
    """

    def __init__(self, source: SampleSource, check: Check | None = None) -> None:
        self.source, self.check, self.in_blocks = source, check, block_of(source)
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return next_usable(self.source, index, self.check, self.skipped)

    def fingerprint(self) -> Facts:
        """That of the source."""
        return source_fingerprint(self.source)

    def label(self, index: int) -> str:
        """The id of the sample that is wanted."""
        return label(self.source, index)


def screen(source: SampleSource, check: Check, rows: int, limit: float, where: str) -> list[Skipped]:
    """Load and check rows before anything trains, all of them or a fixed draw of `rows`; returns the bad ones.

    A draw may only end the run if it leaves little doubt: with three standard deviations above the share.

    Raises:
        TooManyBad: too many are bad.
    """
    size = len(source)
    drawn = range(size) if size <= rows else Order(size, rows, 0, "screen", block_of(source)).window(0)
    bad: list[Skipped] = []
    for index in drawn:
        try:
            check(source[index])
        except DataError as error:
            bad.append(Skipped(label(source, index), str(error)))
    known = getattr(source, "skipped", [])
    if size <= rows:
        check_share([*known, *bad], size + len(known), limit, where)
    elif len(bad) > limit * rows + 3 * math.sqrt(limit * rows):
        check_share(bad, rows, limit, f"{where} (a draw of {rows} from {size})")
    return bad


def note(folder: Path, data: str, skipped: Sequence[Skipped]) -> int:
    """Add rows to the run folder's ``skipped.jsonl``, each once, and return how many of `data` it holds.

    Lines are appended in one write, so that several ranks may do it.
    """
    file = folder / FILE
    ids = {str(row["id"]) for row in noted(folder) if row["data"] == data}
    lines = []
    for one in skipped:
        if one.id not in ids:
            ids.add(one.id)
            lines.append(json.dumps({"data": data, "id": one.id, "reason": one.reason}, ensure_ascii=False) + "\n")
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n"):
            lines.insert(0, "\n")  # a writer was killed in the middle of its line
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            os.write(handle, "".join(lines).encode("utf-8", "backslashreplace"))
        finally:
            os.close(handle)
    return len(ids)


def noted(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``skipped.jsonl``; a torn last line is left out."""
    file = folder / FILE
    rows = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in text.split("\n"):  # and at nothing else: words may hold other ends of lines
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"data", "id"} <= row.keys():
            rows.append(row)
    return rows

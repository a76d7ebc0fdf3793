"""Which rows of a file a reader keeps: those it can use, and a share of bad ones left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from vlmlab.contracts.errors import DataError
from vlmlab.data.readers.records import Row
from vlmlab.data.skipped import Skipped, check_share

T = TypeVar("T")


class RowFilter:
    """Keeps the rows that can be used.

    Args:
        max_bad_fraction: share of the rows that may be bad; 0: the first bad row is raised.

    Attributes:
        skipped: the bad rows met so far.
        seen: rows met so far.
    """

    def __init__(self, max_bad_fraction: float) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise DataError(f"data.max_bad_fraction={max_bad_fraction} is not a share; give a number from 0 to 1")
        self.limit = max_bad_fraction
        self.skipped: list[Skipped] = []
        self.seen = 0

    def rows(self, rows: Iterable[Row | DataError]) -> Iterator[Row]:
        """The rows that could be read at all; a reader gives an error in place of one that could not."""
        for row in rows:
            if not isinstance(row, DataError):
                yield row
                continue
            self.seen += 1
            self.skip(str(row).partition(":")[0], row)

    def keep(self, rows: Iterable[Row], parse: Callable[[Row], T]) -> list[T]:
        """What `parse` makes of every row that it does not refuse."""
        kept = []
        for row in rows:
            self.seen += 1
            try:
                kept.append(parse(row))
            except DataError as error:
                self.skip(_id_of(row), error)
        return kept

    def refuse(self, row: Row, error: DataError) -> None:
        """Leave a row out that is not asked for again, or raise where none may be left out."""
        self.seen += 1
        self.skip(_id_of(row), error)

    def skip(self, id_: str, error: DataError) -> None:
        """Leave a row out, or raise where none may be left out."""
        if not self.limit:
            raise error
        self.skipped.append(Skipped(id_, str(error)))

    def finish(self, where: object) -> list[Skipped]:
        """The skipped rows; raises TooManyBad where they are more than the share."""
        check_share(self.skipped, self.seen, self.limit, str(where))
        return self.skipped


def _id_of(row: Row) -> str:
    given = next((row.data[key] for key in ("id", "question_id", "qid") if row.data.get(key) is not None), None)
    known = isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip()
    return str(given)[:200] if known else f"{row.file.stem}-{row.number}"


def verified(
    items: Sequence[T],
    row_filter: RowFilter,
    load: Callable[[T], object],
    name: Callable[[T], str],
    image: Callable[[T], object] | None = None,
) -> list[T]:
    """The items whose images can be decoded; the others are skipped now instead of in the middle of the scoring.

    Args:
        items: what to look at.
        row_filter: takes the bad ones.
        load: raises DataError for a bad one.
        name: id of an item.
        image: what tells the images of items apart, where several have the same: each is decoded once.
    """
    kept = []
    known: dict[object, DataError | None] = {}
    for item in items:
        key = name(item) if image is None else image(item)
        if key not in known:
            known[key] = None
            try:
                load(item)
            except DataError as error:
                known[key] = error
        found = known[key]
        if found is None:
            kept.append(item)
        else:
            row_filter.skip(name(item), found)
    return kept

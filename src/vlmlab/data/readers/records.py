"""Rows of JSON and JSON-lines files that know their place, so that every mistake is named: file, row, key, remedy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError, brief, listed, reason
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.data.images import ImageFolder, embedded

LINE_SUFFIXES = (".jsonl", ".ndjson")
"""Files with one JSON object per line; every other file is read as one JSON value."""

LONGEST_LINE = 2**26
"""Characters of a line at most: one row needs less, and a whole file that was written as one line is another's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object and where it is; rows and lines are counted from 1."""

    file: Path
    number: int
    data: dict[str, Any]
    unit: str = "row"

    def error(self, problem: str, remedy: str) -> DataError:
        """The one sentence about this row: what is wrong, where, and what to do."""
        return DataError(f"{self.file}, {self.unit} {self.number}: {problem}; {remedy}")

    def text(self, value: object, key: str) -> str:
        """`value` of `key` as words without outer blanks.

        Raises:
            DataError: not a string, nothing but blanks, or characters no tokenizer takes (NUL, half a surrogate pair).
        """
        if not isinstance(value, str):
            raise self.error(f"'{key}' is {describe(value)} instead of text", "write it as a string or remove the row")
        text = value.strip()
        if not text:
            raise self.error(f"'{key}' is empty", "fill it in or remove the row")
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise self.error(f"'{key}' holds a NUL or a broken character", "remove that character or the row")
        return text

    def untagged(self, value: object, key: str) -> str:
        """Like `text`, for words that may have no image."""
        text = self.text(value, key)
        if IMAGE_TAG in text:
            raise self.error(f"'{key}' holds the tag {IMAGE_TAG}", "remove the tag: an image cannot be there")
        return text

    def get(self, key: str) -> Any:
        """The value of a mandatory key; null, as which an empty cell or a NaN is read, is one."""
        if key not in self.data:
            keys = some(self.data)
            remedy = "add it, or name the right key in the configuration"
            raise self.error(f"key '{key}' is missing (keys: {keys})", remedy)
        return self.data[key]


def some(keys: Iterable[str]) -> str:
    """Names of keys for a message: all of a few."""
    return listed(keys, 120)


def describe(value: object) -> str:
    """A JSON value's type in words, for error messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null (or NaN)" if value is None else names.get(type(value), type(value).__name__)


def checked_image(row: Row, name: str, folder: ImageFolder) -> str:
    """The normal form of an image's name; raises DataError (file, row, remedy) where its file cannot be used."""
    reason = folder.check(name)
    if reason:
        remedy = "correct the row, or set data.images to the images' folder"
        if embedded(name):
            remedy = "write the image to a file and give its name"
        raise row.error(f"image '{brief(name, 120)}' {reason}", remedy)
    return folder.name(name)


def without_nan(value: Any) -> Any:
    """A value read from a table, with null in place of every number that is none (NaN, infinite): an empty cell."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list) else value


def read_text(path: Path) -> str:
    """The words of a UTF-8 file (a byte order mark at its start is dropped).

    Raises:
        DataError: the file is absent, not a file, unreadable, empty, or in another encoding.
    """
    with _readable(path):
        text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise _empty(path)
    return text


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What keeps a file from being read, as a DataError that names it."""
    if not path.is_file():
        reason = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"Data file {path} {reason}; give the right path (relative paths start at {Path.cwd()})")
    try:
        yield
    except UnicodeDecodeError as error:
        byte = f"byte {error.start}"
        raise DataError(f"Data file {path} is not UTF-8 ({byte}); convert it, e.g. with iconv -t utf-8") from None
    except OSError as error:
        raise DataError(f"Data file {path} cannot be read ({error.strerror}); check its permissions") from None


def _empty(path: Path) -> DataError:
    return DataError(f"Data file {path} is empty; download or write it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict; a key given twice is an error, because readers disagree on which one counts."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{twice}' occurs twice in one object")
    return made


def _number(text: str) -> float | None:
    """A JSON number; null where it is too large for one, as for NaN and Infinity, which are not JSON."""
    number = float(text)
    return number if isfinite(number) else None


def parse_json(text: str) -> Any:
    """A JSON value, with null in place of NaN and infinite numbers; raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=lambda _: None)


def _parse(text: str, place: str, remedy: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON ({reason(error)}); {remedy}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file; raises DataError as `read_text` does, and where the text is not JSON."""
    remedy = f"repair it (a file with one object per line is named {LINE_SUFFIXES[0]})"
    return _parse(read_text(path), f"Data file {path}", remedy)


def _lines(path: Path) -> Iterator[Row | DataError]:
    found = False
    for number, line in enumerate(_text_lines(path), 1):
        if line.strip():  # blank lines carry nothing and are common at the end
            found = True
            try:
                if len(line) > LONGEST_LINE:
                    limit = f"has more than {LONGEST_LINE:,} characters"
                    raise DataError(f"{path}, line {number}: {limit}; give each object a line of its own")
                value = _parse(line, f"{path}, line {number}", "repair or remove the line")
                yield _row(path, number, value, "line")
            except DataError as error:
                yield error
    if not found:
        raise _empty(path)


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, one at a time; of one that is too long its beginning, a character more than may be."""
    number = 0
    with _readable(path), path.open(encoding="utf-8-sig") as file:
        try:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                yield line
                while len(line) > LONGEST_LINE and not line.endswith("\n"):
                    line = file.readline(LONGEST_LINE + 1)
        except UnicodeDecodeError:
            remedy = "convert it, e.g. with iconv -t utf-8"
            raise DataError(f"Data file {path} is not UTF-8 (after line {number}); {remedy}") from None


def each_row(path: Path, values: object, key: str, unit: str = "row") -> Iterator[Row | DataError]:
    """The list `values`, found under `key` of a file, as rows or, in place of a value that is not an object, its error.

    Raises:
        DataError: it is not a list, or an empty one.
    """
    if not isinstance(values, list):
        raise DataError(f"Data file {path} holds {describe(values)} as {key} where a list is needed; correct the file")
    if not values:
        raise DataError(f"Data file {path} holds an empty list as {key}; give a file with rows")
    return _each(path, values, unit)


def _each(path: Path, values: list[Any], unit: str) -> Iterator[Row | DataError]:
    for number, value in enumerate(values, 1):
        try:
            yield _row(path, number, value, unit)
        except DataError as error:
            yield error


def _row(path: Path, number: int, value: object, unit: str) -> Row:
    if isinstance(value, dict):
        return Row(path, number, value, unit)
    raise Row(path, number, {}, unit).error(f"is {describe(value)} instead of an object", "repair or remove it")


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[Row]:
    """All rows of a JSON list, of a list inside a JSON object (under the first of `keys` it has), or of JSON lines.

    Raises:
        DataError: as `read_text` and `read_json`; no list of rows; a row that is not an object.
    """
    rows = []
    for row in read_each(path, keys):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    return rows


def read_each(path: Path, keys: Sequence[str] = (), by_id: str | None = None) -> Iterator[Row | DataError]:
    """Like `read_rows`, with an error in place of a row that is not an object; raises where the whole file is at fault.

    With `by_id`, a file may also be one object of rows by their ids (as GQA's), which they then have under that key.
    """
    if path.suffix.lower() in LINE_SUFFIXES:
        return _lines(path)
    value = read_json(path)
    if isinstance(value, dict):
        found = next((key for key in keys if key in value), None)
        if found is None and by_id is not None and _is_by_id(value):
            named = [{by_id: id_, **row} if isinstance(row, dict) else row for id_, row in value.items()]
            return each_row(path, named, "its content")
        if found is None:
            wanted = " or ".join(f"'{key}'" for key in keys)
            remedy = f"put the rows into a list{f' under {wanted}' if wanted else ''}"
            raise DataError(f"Data file {path} is one object (keys: {some(value)}) instead of a list; {remedy}")
        return each_row(path, value[found], f"'{found}'")
    return each_row(path, value, "its content")


def _is_by_id(value: dict[str, Any]) -> bool:
    """Whether an object is one of rows by their ids; some of them may be null."""
    return any(value.values()) and all(row is None or isinstance(row, dict) for row in value.values())


def parse_object(text: str, place: str) -> dict[str, Any]:
    """One JSON object; raises DataError, naming the place, where the text is none."""
    value = _parse(text, place, "repair or remove it")
    if not isinstance(value, dict):
        raise DataError(f"{place} is {describe(value)} instead of an object; repair or remove it")
    return value

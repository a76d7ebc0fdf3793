"""Rows of any columns as conversations, questions or captions: which column is what, and what a row then says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vlmlab.contracts.errors import DataError, UserError, listed
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.images import ImageFolder
from vlmlab.data.pixels import Range
from vlmlab.data.readers.llava import TURN_KEYS, LlavaFormat, parse_turns
from vlmlab.data.readers.opened import check_columns
from vlmlab.data.readers.parquet import open_picture, pictures
from vlmlab.data.readers.records import Row
from vlmlab.data.readers.vqa import VqaFormat, parse_question

Records = Literal["conversations", "questions", "captions"]

Picture = tuple[str | None, bytes | None]
"""Path and bytes of an image that is not decoded yet."""

FOUND_AS = {
    "image": ("image", "images"),
    "conversations": TURN_KEYS,
    "question": ("question",),
    "answer": ("answer",),
    "answers": ("answers",),
    "caption": ("caption", "captions"),
    "kind": ("answer_type", "question_type"),
}
"""The keys of ``columns``, and the names that are looked for where none is given."""

_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "conversations": (("conversations",),),
    "questions": (("question",), ("answer", "answers")),
    "captions": (("caption",),),
}
"""What each kind of record needs: one of each group."""

_USES = {
    "conversations": ("image", "conversations"),
    "questions": ("image", "question", "answer", "answers", "kind"),
    "captions": ("image", "caption"),
}


@dataclass(frozen=True)
class Columns:
    """Which column of a set is what.

    Attributes:
        records: what a row is.
        columns: what it is here -> the set's column.
    """

    records: Records
    columns: dict[str, str]


def mapping(
    path: str, there: Sequence[str], records: Records | None, given: Mapping[str, str | None] | None
) -> Columns:
    """Find the columns of a set.

    Args:
        path: the set, for messages.
        there: its columns.
        records: what a row is; None: the first of conversations, questions and captions whose columns are there.
        given: a key of `FOUND_AS` -> the set's own column; None: the usual names.

    Raises:
        UserError: an unknown key, or an unknown kind of record.
        DataError: a column is not there, or none of a kind that is needed.
    """
    named = {key: name for key, name in (given or {}).items() if name is not None}
    if unknown := [key for key in named if key not in FOUND_AS]:
        raise UserError(f"data.columns.{unknown[0]} is unknown; the keys are {', '.join(FOUND_AS)}")
    if records is not None and records not in get_args(Records):
        raise UserError(f"data.records={records} is unknown; choose from {', '.join(get_args(Records))}, or null")
    check_columns(path, list(named.values()), there)
    usual = {key: next((name for name in names if name in there), None) for key, names in FOUND_AS.items()}
    found = {key: name for key, name in (usual | named).items() if name is not None}
    fitting = [kind for kind in get_args(Records) if all(any(k in found for k in keys) for keys in _NEEDS[kind])]
    kind = records or next(iter(fitting), None)
    if kind is None or kind not in fitting:
        wanted = (
            " and ".join(" or ".join(keys) for keys in _NEEDS[kind]) if kind else "conversations, question, caption"
        )
        raise DataError(
            f"{path} has no column for {wanted} (columns: {listed(there)}); name them, as in data.columns.question=..."
        )
    return Columns(kind, {key: found[key] for key in _USES[kind] if key in found})


@dataclass
class Reader:
    """What the rows of a set say.

    Attributes:
        mapping: which column is what.
        prompt: of captions.
        talk: how conversations are read.
        suffix: words after every question.
        folder: where image files are that rows only name.
        placed: whether the paths of images are whole ones of this machine (``imagefolder``).
        values: black and white of an image.
        labels: names of the classes of columns that hold their numbers.
    """

    mapping: Columns
    prompt: str
    talk: LlavaFormat
    suffix: str
    folder: ImageFolder | None
    placed: bool
    values: Range
    labels: dict[str, list[str]] = field(default_factory=dict)

    def row(self, file: Path, number: int, data: Mapping[str, Any]) -> Row:
        """A row by the names that its columns have here."""
        return Row(file, number, {key: self._named(key, data[name]) for key, name in self.mapping.columns.items()})

    def _named(self, key: str, value: Any) -> Any:
        names = self.labels.get(key)
        plain = isinstance(value, int) and not isinstance(value, bool)
        return names[value] if names is not None and plain and 0 <= value < len(names) else value

    def told(self, row: Row) -> tuple[tuple[Turn, ...], str, list[Picture]]:
        """Turns, system line and images of a row.

        Raises:
            DataError: file, row, what is wrong, and what to do.
        """
        found = self.pictures(row)
        if self.mapping.records == "conversations":
            record = parse_turns(row, self.talk, len(found))
            return record.turns, record.system, found
        if not found:
            raise row.error("has no image", "repair or remove the row")
        return (self._question(row) if self.mapping.records == "questions" else self._caption(row),), "", found

    def sample(self, row: Row, name: str) -> Sample:
        """A row with its images decoded; raises DataError as `told` does, and for images that cannot be used."""
        turns, system, found = self.told(row)
        images = tuple(open_picture(row, one, self.folder, self.values) for one in found)
        return Sample(name, images, turns, system, tuple(map(picture_name, found)))

    def pictures(self, row: Row) -> list[Picture]:
        """The images of a row as they are there; a column of names is one of files."""
        value = row.data.get("image")
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, str) for entry in entries):
            row.data["image"] = [{"path": e, "bytes": None} if isinstance(e, str) else e for e in entries]
        found = pictures(row, ("image",))
        if not self.placed or self.folder is None:
            return found
        root = self.folder.root
        return [(os.path.relpath(path, root) if path and data is None else path, data) for path, data in found]

    def _question(self, row: Row) -> Turn:
        form = VqaFormat("image", "question", None, "answer", "answers", ("kind",), self.suffix)
        row.data["image"] = "given"  # it came with the row
        return parse_question(row, form, None).turn()

    def _caption(self, row: Row) -> Turn:
        value = row.get("caption")
        many = value if isinstance(value, list) and value else [value]
        texts = tuple(row.untagged(text, "caption") for text in many)
        return Turn(self.prompt, texts[0], "caption", texts if len(texts) > 1 else ())


def picture_name(picture: Picture) -> str:
    """What is the same for the same image: its bytes' hash, or its file."""
    path, data = picture
    return hashlib.sha256(data).hexdigest()[:16] if data else os.path.normpath(path or "")


def class_names(features: Any, columns: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of classes, of the columns that ``datasets`` keeps as numbers."""
    found = {key: getattr(features[name], "names", None) for key, name in columns.items()} if features else {}
    return {key: list(names) for key, names in found.items() if names}

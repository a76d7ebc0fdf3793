"""Conversations about images in the LLaVA form and its relatives: a JSON list or JSON lines beside an image folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vlmlab.contracts.errors import DataError, brief
from vlmlab.contracts.sample import IMAGE_TAG, Image, Sample, Turn
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts
from vlmlab.data.fingerprint import Facts, files_fingerprint
from vlmlab.data.images import ImageFolder
from vlmlab.data.overlap import Stored
from vlmlab.data.readers.place import find_files, split_files
from vlmlab.data.readers.records import Row, checked_image, describe, read_each, some
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, split_of, subset, together

SUFFIXES = (".json", ".jsonl", ".ndjson")
TURN_KEYS = ("conversations", "conversation", "messages")
IMAGE_KEYS = ("image", "images")
UNSUPPORTED = ("video", "videos", "audio", "audios")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "answer",
    "assistant": "answer",
    "bot": "answer",
    "system": "system",
}
"""What the roles found in public files mean."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record, checked: image names in the order of their tags, and the exchanges."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    system: str


@dataclass(slots=True)
class _Message:
    """One message: place (from 1), role (user, answer, system), words with `IMAGE_TAG`, images given inside it."""

    number: int
    role: str
    text: str
    images: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LlavaFormat:
    """How records are read.

    Attributes:
        tags: words that stand for an image; all are rewritten to `IMAGE_TAG`.
        prepend_images: accept a record that has images but no tag, and show the images before its first question.
    """

    tags: tuple[str, ...] = (IMAGE_TAG, "<IMG_CONTEXT>", "<ImageHere>")
    prepend_images: bool = False


def parse_turns(row: Row, form: LlavaFormat, count: int | None = None) -> Conversation:
    """One record without looking for its images; raises DataError (file, row, key, remedy) where it cannot be used.

    Args:
        row: the record.
        form: how it is read.
        count: how many images come with it (inside a parquet file or a tar); None: it names them itself.
    """
    for key in UNSUPPORTED:
        if row.data.get(key):
            raise row.error(f"'{key}' is not supported, only images are", "remove the row")
    messages = [_message(row, number, value, form) for number, value in enumerate(_turns(row), 1)]
    system = messages.pop(0).text if messages[0].role == "system" else ""
    turns = _exchanges(row, messages)
    names = _images(row, messages) if count is None else ("",) * count
    tags = sum(turn.prompt.count(IMAGE_TAG) for turn in turns)
    if tags != len(names) and not (form.prepend_images and tags == 0):
        remedy = "give as many tags as images"
        if not tags:
            remedy += ", or set data.prepend_images=true to show the images first"
        raise row.error(f"{tags} image tags ({', '.join(form.tags)}) for {len(names)} images", remedy)
    return Conversation(_id(row), names, turns, system)


def parse_record(row: Row, form: LlavaFormat, folder: ImageFolder) -> Conversation:
    """One record, checked; raises DataError (file, row, key, remedy) where it cannot be used."""
    record = parse_turns(row, form)
    return replace(record, images=tuple(checked_image(row, name, folder) for name in record.images))


def _id(row: Row) -> str:
    value = row.data.get("id")
    if value is None:
        return f"{row.file.stem}-{row.number}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return row.text(value, "id")


def _turns(row: Row) -> list[Any]:
    key = next((key for key in TURN_KEYS if key in row.data), None)
    if key is None:
        keys = some(row.data)
        remedy = f"give the turns as a list under {' or '.join(TURN_KEYS)}"
        raise row.error(f"no '{TURN_KEYS[0]}' (keys: {keys})", remedy)
    turns = row.data[key]
    if not isinstance(turns, list) or not turns:
        kind = "an empty list" if turns == [] else describe(turns)
        raise row.error(f"'{key}' is {kind} instead of a list of turns", "fill it in or remove the row")
    return turns


def _message(row: Row, number: int, value: object, form: LlavaFormat) -> _Message:
    if not isinstance(value, dict):
        raise row.error(f"turn {number} is {describe(value)} instead of an object", "repair or remove the row")
    word = value.get("from", value.get("role"))
    role = ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise row.error(f"turn {number} has the role {brief(repr(word), 60)}", f"use one of {known}, or remove the row")
    content = value.get("value", value.get("content"))
    if content is None:
        keys = some(value)
        raise row.error(f"turn {number} has no text (keys: {keys})", "give it under 'value' or 'content'")
    text, images = _content(row, number, content, form) if isinstance(content, list) else (content, [])
    text = row.text(text, f"text of turn {number}")
    for tag in form.tags:
        text = text.replace(tag, IMAGE_TAG)
    if role != "user" and (images or IMAGE_TAG in text):
        remedy = f"move the image to a question, or remove {IMAGE_TAG}"
        raise row.error(f"turn {number} ({word}) holds an image", remedy)
    return _Message(number, role, text, images)


def _content(row: Row, number: int, parts: list[Any], form: LlavaFormat) -> tuple[str, list[str]]:
    """Words and images of a message given in parts; an image part keeps its place unless the words have tags."""
    words: list[str] = []
    images: list[str] = []
    for part in parts:
        if not isinstance(part, dict):
            raise row.error(f"turn {number} has {describe(part)} as a part", "give parts as objects with a 'type'")
        kind = part.get("type")
        if kind == "text":
            words.append(row.text(part.get("text"), f"text of turn {number}"))
        elif kind in ("image", "image_url"):
            given = part.get(kind)
            given = given.get("url") if isinstance(given, dict) else given
            if given is not None:  # where it is null, the part is the place of one of the row's images
                images.append(row.text(given, f"image of turn {number}"))
            words.append(IMAGE_TAG)
        else:
            remedy = "only text and images are supported: remove the row"
            raise row.error(f"turn {number} has a part of type '{brief(str(kind), 60)}'", remedy)
    tagged = any(tag in word for word in words if word != IMAGE_TAG for tag in form.tags)
    return "\n".join(word for word in words if not (tagged and word == IMAGE_TAG)), images


def _exchanges(row: Row, messages: list[_Message]) -> tuple[Turn, ...]:
    """Questions and answers in pairs; anything but question, answer, question, answer ... is refused."""
    for place, message in enumerate(messages):
        wanted = ("user", "answer")[place % 2]
        if message.role != wanted:
            problem = f"turn {message.number} is of role {message.role} where {wanted} is due"
            raise row.error(problem, "let questions and answers alternate, or remove the row")
    if not messages or len(messages) % 2:
        raise row.error("the last turn has no answer", "add the answer or remove the row")
    pairs = zip(messages[::2], messages[1::2], strict=True)
    return tuple(Turn(question.text, answer.text) for question, answer in pairs)


def _images(row: Row, messages: list[_Message]) -> tuple[str, ...]:
    given = [key for key in IMAGE_KEYS if row.data.get(key) is not None]
    inside = [name for message in messages for name in message.images]
    if len(given) + bool(inside) > 1:
        raise row.error("images are given in more than one place", f"give them under one of {', '.join(IMAGE_KEYS)}")
    if not given:
        return tuple(inside)
    value = row.data[given[0]]
    return tuple(row.text(name, given[0]) for name in (value if isinstance(value, list) else [value]))


class LlavaJson:
    """Conversations as samples; records are read and checked at once, pixels when a sample is asked for.

    A record has its turns under `conversations`, `conversation` or `messages` (from/value or role/content, where
    content may be a list of text and image parts), its images under `image` or `images` (a name or a list), or neither.
    Ids that occur again get "#2", "#3", ... in the files' order; records without one are numbered.

    Args:
        path: a JSON list or JSON lines (.jsonl); or a folder or glob of them, or an id of the hub.
        images: the image folder; null is the folder of the (first) file itself.
        split: train or val, or null for every record: by the files' names (train.json, val.json), otherwise by a hash
            of the first image's name, or of the id of a text; records that share an image stay together.
        size: only so many samples, chosen by seed; null for all.
        seed: of the choice of `size`.
        split_seed: of the split; apart from `seed`, so that runs with other seeds share their held-out records.
        val_fraction: share of the images that is held out.
        tags, prepend_images: see `LlavaFormat`.
        max_bad_fraction: share of the records that may be unusable and are left out; 0: the first is an error.
        verify: decode all images at once, to leave out records of broken ones (for sets that are scored).
        image_roots, image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the records that were left out.

    Raises:
        DataError: the file, the folder or a record cannot be used, or the split is empty.
    """

    turns_in_memory = True

    def __init__(
        self,
        path: Text,
        images: Text | None = None,
        split: Split | None = None,
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        tags: Texts = (IMAGE_TAG, "<IMG_CONTEXT>", "<ImageHere>"),
        prepend_images: bool = False,
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_roots: Texts = (),
        image_range: Levels = "auto",
    ) -> None:
        check_split(split, val_fraction, 0.0)
        files, shares = split_files(find_files(path, SUFFIXES), split, val_fraction, 0.0)
        folder = images if images is not None else files[0].parent if files else path
        self._folder = ImageFolder(folder, image_roots, image_range)
        self._files = files
        form, row_filter = LlavaFormat(tuple(tags), prepend_images), RowFilter(max_bad_fraction)
        records: list[Conversation] = []
        for file in files:
            records += row_filter.keep(
                row_filter.rows(read_each(file)), lambda row: parse_record(row, form, self._folder)
            )
        row_filter.finish(path)
        kept = list(zip(_unique([record.id for record in records]), records, strict=True))
        if shares is not None:
            same = self._folder.same(image for record in records for image in record.images)
            groups = together([[same[image] for image in record.images] or [name] for name, record in kept])
            splits = [split_of(name, *shares, split_seed) for name in groups]
            kept = [entry for entry, found in zip(kept, splits, strict=True) if found == split]
        if not kept:
            remedy = "raise data.val_fraction, or give a larger file"
            raise DataError(f"Data file {path} has no record for the split '{split}' ({len(records)} in all); {remedy}")
        self._records = [kept[i] for i in subset([name for name, _ in kept], size, seed)]
        if verify:
            self._records = verified(
                self._records, row_filter, lambda entry: self._pixels(entry[1]), lambda entry: entry[0]
            )
        self.skipped = row_filter.finish(path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        name, record = self._records[index]
        return Sample(name, self._pixels(record), record.turns, record.system, record.images)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its images."""
        return self._records[index][1].turns

    def stored(self, most: int) -> Iterator[Stored]:
        """Its images as they are kept."""
        return self._folder.stored((image for _, record in self._records for image in record.images), most)

    def fingerprint(self) -> Facts:
        """Facts that change with the content of its files."""
        return files_fingerprint(self._files) | self._folder.fingerprint(
            image for _, record in self._records for image in record.images
        )

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return self._records[index][0]

    def _pixels(self, record: Conversation) -> tuple[Image, ...]:
        return tuple(self._folder.load(image) for image in record.images)


def _unique(ids: list[str]) -> list[str]:
    """The ids, repeated ones told apart: real files have several conversations under an image's number."""
    seen: dict[str, int] = {}
    made = []
    for id_ in ids:
        seen[id_] = seen.get(id_, 0) + 1
        made.append(id_ if seen[id_] == 1 else f"{id_}#{seen[id_]}")
    return made

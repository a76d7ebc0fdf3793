"""Conversations about images in the LLaVA form and its relatives: a JSON list or JSON lines beside an image folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, Turn
from vlmlab.data.images import ImageFolder
from vlmlab.data.records import Row, describe, read_rows
from vlmlab.data.split import check_split, split_of, subset

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


def parse_record(row: Row, form: LlavaFormat, folder: ImageFolder) -> Conversation:
    """One record, checked; raises DataError (file, row, key, remedy) where it cannot be used."""
    for key in UNSUPPORTED:
        if row.data.get(key):
            raise row.error(f"'{key}' is not supported, only images are", "remove the row")
    messages = [_message(row, number, value, form) for number, value in enumerate(_turns(row), 1)]
    system = messages.pop(0).text if messages[0].role == "system" else ""
    turns = _exchanges(row, messages)
    names = _images(row, messages)
    tags = sum(turn.prompt.count(IMAGE_TAG) for turn in turns)
    if tags != len(names) and not (form.prepend_images and tags == 0):
        remedy = "give as many tags as images"
        if not tags:
            remedy += ", or set data.prepend_images=true to show the images first"
        raise row.error(f"{tags} image tags ({', '.join(form.tags)}) for {len(names)} images", remedy)
    for name in names:
        reason = folder.check(name)
        if reason:
            raise row.error(f"image '{name}' {reason}", "correct the row, or set data.images to the images' folder")
    return Conversation(_id(row), names, turns, system)


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
        keys = ", ".join(row.data) or "none"
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
        raise row.error(f"turn {number} has the role {word!r}", f"use one of {known}, or remove the row")
    content = value.get("value", value.get("content"))
    if content is None:
        keys = ", ".join(value)
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
    """Words and images of a message given in parts; an image part stands where it is unless the words have tags."""
    words: list[str] = []
    images: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else describe(part)
        if kind == "text":
            words.append(row.text(part.get("text"), f"text of turn {number}"))
        elif kind in ("image", "image_url"):
            given = part.get(kind)
            given = given.get("url") if isinstance(given, dict) else given
            images.append(row.text(given, f"image of turn {number}"))
            words.append(IMAGE_TAG)
        else:
            remedy = "only text and images are supported: remove the row"
            raise row.error(f"turn {number} has a part of type '{kind}'", remedy)
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
    Ids that occur again get "#2", "#3", ... in the file's order; records without one are numbered.

    Args:
        path: a JSON list, or JSON lines (.jsonl).
        images: the image folder; null is the folder of the file itself.
        split: train or val (by a hash of the first image's name, or of the id of a text), or null for every record.
        size: only so many samples, chosen by seed; null for all.
        seed: of the choice of `size`.
        split_seed: of the split; apart from `seed`, so that runs with other seeds share their held-out records.
        val_fraction: share of the images that is held out.
        tags, prepend_images: see `LlavaFormat`.

    Raises:
        DataError: the file, the folder or a record cannot be used, or the split is empty.
    """

    def __init__(
        self,
        path: str,
        images: str | None = None,
        split: str | None = None,
        size: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.05,
        tags: Sequence[str] = (IMAGE_TAG, "<IMG_CONTEXT>", "<ImageHere>"),
        prepend_images: bool = False,
    ) -> None:
        check_split(split, val_fraction, 0.0)
        file = Path(path).expanduser()
        self._folder = ImageFolder(images if images is not None else file.parent)
        form = LlavaFormat(tuple(tags), prepend_images)
        records = [parse_record(row, form, self._folder) for row in read_rows(file)]
        named = list(zip(_unique([record.id for record in records]), records, strict=True))
        first = [(record.images or (name,))[0] for name, record in named]
        splits = [split_of(image, val_fraction, 0.0, split_seed) for image in first]
        kept = [entry for entry, found in zip(named, splits, strict=True) if split in (None, found)]
        if not kept:
            remedy = "raise data.val_fraction, or give a larger file"
            raise DataError(f"Data file {file} has no record for the split '{split}' ({len(named)} in all); {remedy}")
        self._records = [kept[i] for i in subset([name for name, _ in kept], size, seed)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        name, record = self._records[index]
        pixels = tuple(self._folder.load(image) for image in record.images)
        return Sample(name, pixels, record.turns, record.system, record.images)


def _unique(ids: list[str]) -> list[str]:
    """The ids, repeated ones told apart: real files have several conversations under an image's number."""
    seen: dict[str, int] = {}
    made = []
    for id_ in ids:
        seen[id_] = seen.get(id_, 0) + 1
        made.append(id_ if seen[id_] == 1 else f"{id_}#{seen[id_]}")
    return made

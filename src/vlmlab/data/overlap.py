"""Images that training shares with what it is scored on: by file or by bytes, whatever their names. Free of torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from omegaconf import DictConfig

from vlmlab.contracts.errors import DataError, brief
from vlmlab.contracts.sample import SampleSource

T = TypeVar("T", bound=Hashable)

FILE = "path"
"""Key of a source that reads a file; one without it is generated and cannot be broken."""

PARTS = "parts"
"""Key of a mixture by names, whose parts are read."""

INNER = ("source", "pool")
"""Keys of a source that is made of others, beside a mixture's ``sources``."""

LOOKED_AT = 20_000
"""Files of a source whose sizes are compared, spread over all of them."""

HASHED = 64 * 2**20
"""Bytes that are read of a source; files are read only where one of the other side has the same size."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as it is kept, without being decoded.

    Attributes:
        name: of the file, the member or the row.
        size: in bytes.
        read: gives them.
    """

    name: str
    size: int
    read: Callable[[], bytes]


def stored_images(source: SampleSource) -> list[Stored]:
    """Some of a source's images, spread over all; none where it does not keep them in files.

    One that does has a method ``stored(most)`` that gives each once.
    """
    told = getattr(source, "stored", None)
    found: list[Stored] = [] if told is None else list(told(LOOKED_AT))
    return found


def same_bytes(train: Sequence[Stored], other: Sequence[Stored]) -> list[tuple[str, str]]:
    """Pairs of names, of `train` and of `other`, with the same bytes; those found within the limits."""
    common = {one.size for one in train} & {one.size for one in other}
    first: dict[bytes, str] = {}
    for key, one in _hashed(one for one in train if one.size in common):
        first.setdefault(key, one.name)
    return [(first[key], one.name) for key, one in _hashed(one for one in other if one.size in common) if key in first]


def sentence(pairs: Sequence[tuple[str, str]], train: str, other: str, same: str = "byte for byte") -> str:
    """What there is to say about images on both sides."""
    first = brief(pairs[0][0] if pairs[0][0] == pairs[0][1] else f"{pairs[0][0]} is {pairs[0][1]}", 100)
    images = "1 image" if len(pairs) == 1 else f"{len(pairs)} images"
    return f"{images} of {other} {'is' if len(pairs) == 1 else 'are'} in {train} too, {same} ({first})"


def reads(node: DictConfig) -> bool:
    """Whether a source's configuration, or that of one it is made of, names a file; others are generated."""
    within = [*(node.get("sources") or ()), *(node.get(key) for key in INNER)]
    named = node.get(FILE) is not None or bool(node.get(PARTS))
    return named or any(reads(part) for part in within if isinstance(part, DictConfig))


def spread(items: Iterable[T], most: int) -> list[T]:
    """At most so many of the items, each once, evenly out of all."""
    each = list(dict.fromkeys(items))
    return each if len(each) <= most else [each[k * len(each) // most] for k in range(most)]


def _hashed(stored: Iterable[Stored]) -> Iterator[tuple[bytes, Stored]]:
    room = HASHED
    for one in stored:
        room -= one.size
        if room < 0:
            return
        try:
            yield hashlib.sha256(one.read()).digest(), one
        except (OSError, DataError):  # met again, and named, when its sample is asked for
            continue

"""Train, val and test by a hash of the image's name: no image is in two splits, on any machine, in any file order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

from vlmlab.contracts.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing"),
}


def unit_hash(text: str, seed: int) -> float:
    """A number in [0, 1), a pure function of text and seed (the first 53 bits of SHA-256)."""
    digest = hashlib.sha256(f"{seed}/{text}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def split_of(name: str, val: float, test: float, seed: int) -> str:
    """The split of an image: "test" for the first `test` of the unit interval, then "val", else "train".

    Adding images moves no other image, and raising `val` or `test` only takes images out of "train" (or, for `test`,
    out of "val" first).
    """
    place = unit_hash(name, seed)
    return "test" if place < test else "val" if place < test + val else "train"


def together(members: Sequence[Sequence[str]]) -> list[str]:
    """What each row is split by, so that no two splits share a member: rows that share one, directly or through other
    rows, get the same name, the smallest of their first members.

    Args:
        members: of each row, such as the names of its images; at least one.
    """
    over: dict[str, str] = {}

    def top(name: str) -> str:
        while over.setdefault(name, name) != name:
            over[name] = name = over[over[name]]
        return name

    for first, *others in members:
        for other in others:
            over[top(other)] = top(first)
    smallest: dict[str, str] = {}
    for first, *_ in members:
        smallest[top(first)] = min(first, smallest.get(top(first), first))
    return [smallest[top(first)] for first, *_ in members]


def named_split(value: str) -> str | None:
    """The split a file's own word stands for ("validation" is "val"), or None for an unknown word."""
    word = value.strip().lower()
    return next((split for split, words in _ALIASES.items() if word in words), None)


def check_split(split: str | None, val: float, test: float) -> None:
    """Raises UserError where the split is none of train, val, test, or the fractions leave nothing to train on."""
    if split is not None and split not in SPLITS:
        raise UserError(f"Unknown split '{split}'; choose one of {', '.join(SPLITS)}, or null for all rows")
    if val < 0 or test < 0 or val + test >= 1:
        raise UserError(f"val_fraction {val} and test_fraction {test} must be 0 or more and add up to less than 1")


def subset(names: Sequence[str], size: int | None, seed: int) -> list[int]:
    """Indices, in order, of `size` of the names (all of them for None), the same ones for the same seed."""
    if size is None or size >= len(names):
        return list(range(len(names)))
    if size < 1:
        raise UserError(f"size={size} leaves no sample; use a positive number or null for all")
    ranked = sorted(range(len(names)), key=lambda i: (unit_hash(names[i], seed), i))
    return sorted(ranked[:size])

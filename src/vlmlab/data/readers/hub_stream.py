"""A data set of the hub as a stream: read while training goes on, and still the same sample for the same number."""

from __future__ import annotations

import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError, UserError, listed
from vlmlab.contracts.sample import IMAGE_TAG, Sample, Turn
from vlmlab.contracts.values import Count, Levels, Natural, Text, Texts
from vlmlab.data.fingerprint import Facts
from vlmlab.data.pixels import value_range
from vlmlab.data.readers.hub import image_folder
from vlmlab.data.readers.llava import LlavaFormat
from vlmlab.data.readers.mapped import Reader, Records, class_names, mapping
from vlmlab.data.readers.opened import open_set, told
from vlmlab.data.readers.records import Row, without_nan
from vlmlab.data.skipped import Skipped

HELD = 2
"""Blocks that are held at a time: a batch may reach over the end of one."""

SETTLE = 0.3
"""Seconds that Arrow's threads get to come to an end."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

_Rows = list[dict[str, Any]]


class HubStream:
    """The first `size` rows of a split, in the set's own order, as samples; read while training goes on.

    What sample n is follows from the set's commit, `skip` and n alone, so that a run which is stopped goes on with the
    same samples. It gets to its place by reading the rows before it over, undecoded; the place is not stored. Training
    shuffles within blocks of `buffer` samples, anew in every pass, and takes the blocks in order (``datasets``' own
    shuffled streams lose what is in their buffer when they are resumed). Each rank and each worker reads the stream for
    itself. A mixture, a choice by size and seed, and a split by image need all rows, and so `HubRecords`.

    Args:
        path, records, columns, config, images, prompt, suffix, tags, prepend_images, image_roots, image_range, cache:
            see `vlmlab.data.readers.hub.HubRecords`.
        size: how many rows; the set must have as many after `skip`.
        revision: of one of the hub its commit (40 hexadecimal digits), as a branch may move while a run is stopped.
        split: the set's own word for the split.
        skip: rows before the first (those that are held out).
        buffer: samples that are shuffled among themselves; two such blocks are in memory, images undecoded.

    Attributes:
        in_blocks: see `vlmlab.contracts.sample.SampleSource`.
        skipped: empty; bad rows show when they are read.

    Raises:
        DataError: the set, the split or a column is not there.
        UserError: ``datasets`` is not installed, or one of the hub comes without a commit.
    """

    def __init__(
        self,
        path: Text,
        size: Count,
        records: Records | None = None,
        columns: Mapping[str, Text | None] | None = None,
        config: Text | None = None,
        revision: Text | None = None,
        split: Text = "train",
        skip: Natural = 0,
        buffer: Count = 1000,
        images: Text | None = None,
        prompt: Text = "Describe the picture briefly.",
        suffix: str = "",
        tags: Texts = (IMAGE_TAG, "<IMG_CONTEXT>", "<ImageHere>"),
        prepend_images: bool = False,
        image_roots: Texts = (),
        image_range: Levels = "auto",
        cache: Text | None = None,
    ) -> None:
        self._set = open_set(path, config, revision, cache)
        if self._set.root is None and _COMMIT.fullmatch(revision or "") is None:
            raise UserError(
                f"data.path={path} is streamed, and the same rows come again only of one commit; set "
                f"data.revision={self._set.commit}, which is what the hub has now, or another commit."
            )
        if split not in self._set.splits:
            known = listed(self._set.splits)
            raise DataError(f"{path} has no split '{split}' (splits: {known}); set data.split to one of them")
        self._split, self._size, self._skip, self.in_blocks = split, size, skip, buffer
        stream = self._set.stream(split)
        with told(path):
            first = next(iter(stream.with_format("arrow")), None)
        if first is None:
            raise DataError(f"{path} has no row in the split '{split}'; set data.split to another")
        found = mapping(path, first.column_names, records, columns)
        folder = image_folder(self._set, images, image_roots, image_range)
        self._reader = Reader(
            found, prompt, LlavaFormat(tuple(tags), prepend_images), suffix, folder, self._set.images,
            value_range(image_range), class_names(stream.features, found.columns),
        )  # fmt: skip
        self.skipped: list[Skipped] = []
        self._begin()

    def _begin(self) -> None:
        """Nothing is open yet, in this process."""
        self._pid, self._next = os.getpid(), 0
        self._rows: list[Iterator[dict[str, Any]]] = []  # one while it is read
        self._held: OrderedDict[int, _Rows] = OrderedDict()
        weakref.finalize(self, _close, self._rows)  # before the interpreter takes the modules it needs apart

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_rows", "_held")} | {"_pid": 0}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        return self._reader.sample(self._row(range(self._size)[index]), self.label(index))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, its images read with the row but not decoded."""
        return self._reader.told(self._row(range(self._size)[index]))[0]

    def label(self, index: int) -> str:
        """The id of a sample, without loading it: set, split and row."""
        return f"{self._set.name}-{self._split}-{self._skip + index + 1}"

    def fingerprint(self) -> Facts:
        """Id and commit, or facts that change with the content of local files; which rows, and how they are read."""
        facts = self._set.facts([self._split]) | {"split": self._split, "skip": self._skip, "buffer": self.in_blocks}
        return facts | {"records": self._reader.mapping.records, "columns": self._reader.mapping.columns}

    def _row(self, index: int) -> Row:
        block, place = divmod(index, self.in_blocks)
        if self._pid != os.getpid():
            self._begin()
        if block not in self._held:
            self._hold(block)
        rows = self._held[block]
        if place >= len(rows):
            raise self._too_short(block)
        number = self._skip + index + 1
        return self._reader.row(Path(self._set.name) / self._split, number, without_nan(rows[place]))

    def _too_short(self, block: int) -> UserError:
        """The set ends in a block, or before it where the block is empty."""
        there = self._skip + block * self.in_blocks + len(self._held[block])
        few = f"{'only' if self._held[block] else 'at most'} {there} rows"
        left = there - self._skip
        remedy = f"set data.size to {left} or less" if left else "lower data.held_out and data.size"
        return UserError(f"{self._set.path} has {few} in the split '{self._split}'; {remedy}.")

    def _hold(self, block: int) -> None:
        """Read a block: the next one, or by going on from the beginning."""
        if not self._rows or block < self._next:
            self._rows[:], self._next = [self._from(self._skip + block * self.in_blocks)], block
        try:
            with told(self._set.path):
                for _ in range((block - self._next) * self.in_blocks):
                    next(self._rows[0], None)
                self._held[block] = list(islice(self._rows[0], self.in_blocks))
        except DataError as error:  # of the files or the network, and not of a row, for which others could stand
            self._rows.clear()
            raise UserError(str(error)) from None
        self._next = block + 1
        while len(self._held) > HELD:
            self._held.popitem(last=False)

    def _from(self, row: int) -> Iterator[dict[str, Any]]:
        """The rows of the split from one on, of the columns that are used."""
        columns = sorted(set(self._reader.mapping.columns.values()))
        stream = self._set.stream(self._split).select_columns(columns).with_format("arrow")
        return (table.to_pylist()[0] for table in (stream.skip(row) if row else stream))


def _close(rows: list[Iterator[dict[str, Any]]]) -> None:
    """End reading; Arrow's threads, which cannot be joined, abort a process that ends while they still read."""
    if rows:
        rows.clear()
        time.sleep(SETTLE)

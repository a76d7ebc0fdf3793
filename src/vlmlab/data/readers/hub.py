"""Data sets of the hub and whatever else the package ``datasets`` opens: conversations, questions, captions."""

from __future__ import annotations

import importlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, Turn
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts
from vlmlab.data.fingerprint import Facts
from vlmlab.data.images import ImageFolder
from vlmlab.data.overlap import Stored, spread
from vlmlab.data.pixels import value_range
from vlmlab.data.readers.llava import LlavaFormat
from vlmlab.data.readers.mapped import Picture, Reader, Records, class_names, mapping, picture_name
from vlmlab.data.readers.opened import Opened, choose_splits, open_set
from vlmlab.data.readers.parquet import COMPARED
from vlmlab.data.readers.records import Row, without_nan
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, split_of, subset, together

AT_ONCE = 64
"""Rows whose images are looked at together for a split by image."""


class HubRecords:
    """The rows of a data set as samples, each row one; a row is read when it is asked for.

    ``datasets`` finds the files, reads its card for configurations and splits, and keeps rows as memory-mapped Arrow in
    its cache; images are decoded here, by the rules and limits of ``vlmlab.data.images``, and no code of a data set is
    run. A bad row shows when it is read; a file that ``datasets`` cannot parse is an error as a whole.

    Args:
        path: an id of the hub; a folder of parquet, JSON, CSV or Arrow files, of images (with metadata.jsonl or one
            folder a class), or written by ``save_to_disk``; a file or a glob of files.
        records: conversations, questions or captions; null: the first of these whose columns are there.
        columns: image, conversations, question, answer, answers, caption or kind -> the set's own column; null: the
            usual name. Numbers of classes count as their names.
        config: which configuration of the set, where it has several.
        revision: branch, tag or commit of one of the hub; null: its main branch.
        split: train, val, test, or null for every row; a split that the set does not have is taken out of train by the
            image.
        splits: train, val or test -> the set's own word for that split.
        images: the folder of images that rows only name; null: the data's own folder.
        prompt: of captions. Where a row has a list of them the first is learnt, and all are references.
        suffix: words after every question.
        tags, prepend_images: of conversations, see `vlmlab.data.readers.llava.LlavaFormat`.
        size: only so many samples, chosen by seed; null for all.
        seed: of that choice.
        split_seed: of the split by image.
        val_fraction, test_fraction: shares of the images, where the set has no such split.
        max_bad_fraction, verify: with `verify` all rows are read and decoded at once, and up to that share of bad ones
            is left out (for sets that are scored); 0: the first is an error.
        image_roots, image_range: see `vlmlab.data.images.ImageFolder`.
        cache: where ``datasets`` keeps its Arrow files; null: its own place.

    Attributes:
        skipped: the rows that were left out at construction.

    Raises:
        DataError: the set, a split or a column is not there or cannot be read, or the split is empty.
        UserError: ``datasets`` is not installed, or a key of `columns` is unknown.
    """

    def __init__(
        self,
        path: Text,
        records: Records | None = None,
        columns: Mapping[str, Text | None] | None = None,
        config: Text | None = None,
        revision: Text | None = None,
        split: Split | None = None,
        splits: Mapping[str, Text | None] | None = None,
        images: Text | None = None,
        prompt: Text = "Describe the picture briefly.",
        suffix: str = "",
        tags: Texts = (IMAGE_TAG, "<IMG_CONTEXT>", "<ImageHere>"),
        prepend_images: bool = False,
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        test_fraction: Share = 0.1,
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_roots: Texts = (),
        image_range: Levels = "auto",
        cache: Text | None = None,
    ) -> None:
        check_split(split, val_fraction, test_fraction)
        self._set = open_set(path, config, revision, cache)
        own = (splits or {}).get(split) if split is not None else None
        self._splits, shares = choose_splits(self._set, split, own, val_fraction, test_fraction)
        parts = [self._set.rows(name) for name in self._splits]
        found = mapping(path, parts[0].column_names, records, columns)
        used = sorted(set(found.columns.values()))
        self._parts = [part.select_columns(used).with_format("arrow") for part in parts]
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()
        talk = LlavaFormat(tuple(tags), prepend_images)
        folder = image_folder(self._set, images, image_roots, image_range)
        self._reader = Reader(
            found, prompt, talk, suffix, folder, self._set.images, value_range(image_range),
            class_names(parts[0].features, found.columns),
        )  # fmt: skip
        self._index: Sequence[int] | NDArray[np.int64] = range(self._ends[-1])
        if split is not None and shares is not None and any(shares):
            keep = [split_of(name, *shares, split_seed) == split for name in together(self._split_by())]
            self._index = np.flatnonzero(np.array(keep, dtype=bool))
        if not len(self._index):
            remedy = "raise data.val_fraction or data.test_fraction, or give more rows"
            raise DataError(f"{path} has no row for the split '{split}' ({self._ends[-1]} in all); {remedy}")
        chosen = subset([self._label(int(i)) for i in self._index], size, seed) if size is not None else None
        if chosen is not None:
            self._index = np.array([self._index[i] for i in chosen])
        row_filter = RowFilter(max_bad_fraction)
        if verify:
            row_filter.seen = len(self._index)
            self._index = verified([int(i) for i in self._index], row_filter, self._sample, self._label)
        self.skipped = row_filter.finish(path)

    def _at(self, place: int) -> tuple[int, int]:
        """Number of the split, and number there."""
        part = bisect_right(self._ends, place)
        return part, place - (self._ends[part - 1] if part else 0)

    def _label(self, place: int) -> str:
        part, number = self._at(place)
        return f"{self._set.name}-{self._splits[part]}-{number + 1}"

    def _row(self, place: int) -> Row:
        part, number = self._at(place)
        data = without_nan(self._parts[part][number].to_pylist()[0])
        return self._reader.row(Path(self._set.name) / self._splits[part], number + 1, data)

    def _sample(self, place: int) -> Sample:
        return self._reader.sample(self._row(place), self._label(place))

    def _split_by(self) -> list[list[str]]:
        """The images of every row; its number where it has none."""
        column = self._reader.mapping.columns.get("image")
        made: list[list[str]] = []
        for part, split in zip(self._parts, self._splits, strict=True):
            if column is None:
                made += [[self._label(len(made) + k)] for k in range(len(part))]
                continue
            for batch in part.select_columns([column]).iter(AT_ONCE):
                for data in batch.to_pylist():
                    row = self._reader.row(Path(split), len(made) + 1, dict.fromkeys(self._columns()) | data)
                    made.append(self._names(row) or [self._label(len(made))])
        return made

    def _columns(self) -> list[str]:
        return list(self._reader.mapping.columns.values())

    def _names(self, row: Row) -> list[str]:
        return list(map(picture_name, self._pictures(row)))

    def _pictures(self, row: Row) -> list[Picture]:
        try:
            return self._reader.pictures(row)
        except DataError:  # met again, and named, when its sample is asked for
            return []

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(int(self._index[index]))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, its images read with the row but not decoded."""
        return self._reader.told(self._row(int(self._index[index])))[0]

    def label(self, index: int) -> str:
        """The id of a sample, without loading it: set, split and row."""
        return self._label(int(self._index[index]))

    def stored(self, most: int) -> Iterator[Stored]:
        """Its images as they are kept, of as many rows as have `COMPARED` bytes."""
        room, named = COMPARED, list[str]()
        for place in spread(map(int, self._index), most):
            found = self._pictures(self._row(place))
            named += [path for path, data in found if path and data is None]
            for number, (_, data) in enumerate(found):
                if data:
                    room -= len(data)
                    yield Stored(f"{self._label(place)}#{number}", len(data), partial(self._octets, place, number))
            if room < 0:
                break
        if self._reader.folder is not None:
            yield from self._reader.folder.stored(named, len(named))

    def _octets(self, place: int, number: int) -> bytes:
        return self._pictures(self._row(place))[number][1] or b""

    def fingerprint(self) -> Facts:
        """Id and commit of one of the hub; otherwise facts that change with the content of its files and images."""
        facts = self._set.facts(self._splits) | {"records": self._reader.mapping.records}
        facts["columns"] = self._reader.mapping.columns
        if self._reader.folder is None or self._set.images:
            return facts
        named = set(self._named())
        return facts | self._reader.folder.fingerprint(named) if named else facts

    def _named(self) -> Iterator[str]:
        """The image files that rows name; no image inside of a row is read."""
        if (column := self._reader.mapping.columns.get("image")) is None:
            return
        for part in self._parts:
            for batch in part.select_columns([column]).iter(1000):
                yield from (path for path in _paths(batch[column].combine_chunks()) if path)


def _paths(array: Any) -> list[str | None]:
    """The paths in an Arrow column of images that come without their bytes."""
    arrow, compute = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.compute"))
    if arrow.types.is_list(array.type) or arrow.types.is_large_list(array.type):
        array = array.flatten()
    if arrow.types.is_struct(array.type):
        names = [array.type.field(k).name for k in range(array.type.num_fields)]
        if "path" not in names:
            return []
        bare = compute.is_null(compute.struct_field(array, "bytes")) if "bytes" in names else None
        array = compute.struct_field(array, "path")
        array = array if bare is None else array.filter(bare)
    text = arrow.types.is_string(array.type) or arrow.types.is_large_string(array.type)
    return list(array.to_pylist()) if text else []


def image_folder(
    opened: Opened, images: str | None, roots: Sequence[str], values: str | Sequence[float]
) -> ImageFolder | None:
    """Where a set's image files are: in the given folder, in its own, or in the cache of the hub.

    Raises:
        DataError: there is no such folder.
    """
    if images is not None:
        return ImageFolder(images, roots, values)
    if opened.root is not None:
        return ImageFolder(opened.root, roots, values)
    if not opened.images:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    return ImageFolder(HF_HUB_CACHE, [*roots, HF_HUB_CACHE], values)

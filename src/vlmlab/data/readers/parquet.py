"""Parquet shards as the hub keeps image data sets: rows with an image struct {bytes, path} beside columns of text."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import posixpath
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlab.contracts.errors import DataError, UserError, listed, reason
from vlmlab.contracts.sample import IMAGE_TAG, Image, Sample, Turn
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts, Width
from vlmlab.data.fingerprint import Facts, shards_fingerprint
from vlmlab.data.images import ImageFolder, decode_image
from vlmlab.data.overlap import Stored, spread
from vlmlab.data.pixels import Range, value_range
from vlmlab.data.readers.llava import TURN_KEYS, Conversation, LlavaFormat, parse_turns
from vlmlab.data.readers.place import find_files, split_files
from vlmlab.data.readers.records import Row, checked_image, describe, without_nan
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, split_of, subset, together
from vlmlab.data.readers.tar import write_shard
from vlmlab.data.readers.vqa import Question, VqaFormat, choose_rows, conversations, image_words, unique_questions

SUFFIXES = (".parquet",)
IMAGE_KEYS = ("image", "images")
COMPARED = 512 * 2**20
"""Bytes of row groups that are read to compare a source's images with another's."""

_OPEN = 32
_GROUPS = 2
"""Files and decoded row groups that a process keeps; a shuffled order comes back to neither soon."""


def _arrow() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            "Parquet files need the package pyarrow, which is not installed; run pip install 'vlmlab[parquet]'."
        ) from error


class ParquetRows:
    """Random access to the rows of parquet files; one row group is read for a row, so that nothing is held or copied.

    Args:
        files: the shards, in order.

    Attributes:
        columns: names of the first file's columns; all files must have them.

    Raises:
        DataError: a file is damaged or has other columns than the first.
        UserError: pyarrow is not installed.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.columns: list[str] = []
        self._first: list[int] = []  # the number of every row group's first row
        self._groups: list[tuple[int, int]] = []  # its file and place there
        self._before: list[int] = []  # rows in the files before each file
        self._size = 0
        self._pid = 0
        for number, file in enumerate(self.files):
            self._add(number, file)
        names = [file.stem for file in self.files]
        clash = len(set(names)) < len(names)
        self._names = ["-".join(file.with_suffix("").parts[-2:]) for file in self.files] if clash else names

    def _add(self, number: int, file: Path) -> None:
        try:
            facts = _arrow().ParquetFile(file)
            groups = [facts.metadata.row_group(g).num_rows for g in range(facts.metadata.num_row_groups)]
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise DataError(
                f"Data file {file} is not a readable parquet file ({reason(error)}); download it again"
            ) from None
        columns = list(facts.schema_arrow.names)
        self.columns = self.columns or columns
        if missing := [name for name in self.columns if name not in columns]:
            raise DataError(
                f"Data file {file} lacks the column '{missing[0]}' of {self.files[0]}; give shards of one data set"
            )
        self._before.append(self._size)
        for group, rows in enumerate(groups):
            if rows:
                self._first.append(self._size)
                self._groups.append((number, group))
                self._size += rows

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        """One row with all its columns; its number counts from 1 within its file."""
        place = bisect_right(self._first, index) - 1
        data = without_nan(self._table(place).slice(index - self._first[place], 1).to_pylist()[0])
        return Row(*self.at(index), data)

    def at(self, index: int) -> tuple[Path, int]:
        """File and number there, from 1, of a row."""
        number, _ = self._groups[bisect_right(self._first, index) - 1]
        return self.files[number], index - self._before[number] + 1

    def label(self, index: int) -> str:
        """Shard and number of a row: unique, and enough to find it again."""
        number, _ = self._groups[bisect_right(self._first, index) - 1]
        return f"{self._names[number]}-{index - self._before[number] + 1}"

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """These columns of all rows, in order; a part of a struct is named by a dot (image.path)."""
        for number, group in self._groups:
            table = self._file(number).read_row_group(group, columns=list(columns), use_threads=False)
            yield from map(without_nan, table.to_pylist())

    def read_some(self, places: Iterable[int], columns: Sequence[str], room: int) -> Iterator[tuple[int, Row]]:
        """These columns of rows at these places, of as many row groups, spread over all, as have `room` bytes."""
        each: dict[int, list[int]] = {}
        for place in places:
            each.setdefault(bisect_right(self._first, place) - 1, []).append(place)
        whole = sum(self._bytes(group, columns) for group in each)
        for group in spread(each, max(1, len(each) * room // max(whole, 1))):
            number, there = self._groups[group]
            table = self._file(number).read_row_group(there, columns=list(columns), use_threads=False)
            for place in each[group]:
                data = table.slice(place - self._first[group], 1).to_pylist()[0]
                yield place, Row(*self.at(place), without_nan(data))

    def _bytes(self, group: int, columns: Sequence[str]) -> int:
        number, there = self._groups[group]
        facts = self._file(number).metadata.row_group(there)
        every = (facts.column(i) for i in range(facts.num_columns))
        return sum(c.total_uncompressed_size for c in every if c.path_in_schema.partition(".")[0] in columns)

    def paths(self, keys: Sequence[str]) -> list[str]:
        """The columns, named by dots, that hold the paths of the images under these keys."""
        schema = self._file(0).schema
        names = [schema.column(i).path for i in range(len(schema))]
        return [name for name in names if name.endswith(".path") and name.partition(".")[0] in keys]

    def has(self, column: str) -> bool:
        """Whether the files have this column or, named by a dot, this part of a struct."""
        return column in self.columns or any(
            self._file(0).schema.column(i).path == column for i in range(len(self._file(0).schema))
        )

    def _table(self, place: int) -> Any:
        """A row group, decoded; the last few are kept."""
        self._fresh_process()
        if place not in self._tables:
            number, group = self._groups[place]
            self._tables[place] = self._file(number).read_row_group(group, use_threads=False)
            if len(self._tables) > _GROUPS:
                self._tables.popitem(last=False)
        return self._tables[place]

    def _file(self, number: int) -> Any:
        self._fresh_process()
        if number not in self._open:
            self._open[number] = _arrow().ParquetFile(self.files[number], memory_map=True)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return self._open[number]

    def _fresh_process(self) -> None:
        """A worker opens its own files."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._open: OrderedDict[int, Any] = OrderedDict()
            self._tables: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_tables")} | {"_pid": 0}


def pictures(row: Row, keys: Sequence[str]) -> list[tuple[str | None, bytes | None]]:
    """Path and bytes of every image of a row, taken out of it; raises DataError where the column holds no image."""
    given = [key for key in keys if row.data.get(key) is not None]
    value = row.data[given[0]] if given else []
    for key in keys:
        row.data.pop(key, None)
    found: list[tuple[str | None, bytes | None]] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, bytes):
            found.append((None, entry))
        elif isinstance(entry, dict) and {"bytes", "path"} & entry.keys():
            found.append(_in_struct(row, given[0], entry))
        else:
            raise row.error(f"'{given[0]}' is {describe(entry)} instead of an image", "repair or remove the row")
    return found


def stored_pictures(
    rows: ParquetRows, places: Iterable[int], keys: Sequence[str], folder: ImageFolder | None = None
) -> Iterator[Stored]:
    """The images of rows at these places as they are kept: inside the rows, or in the folder where they name them."""
    named: list[str] = []
    for place, row in rows.read_some(places, keys, COMPARED):
        try:
            found = pictures(row, keys)
        except DataError:  # met again, and named, when its sample is asked for
            continue
        named += [path for path, data in found if path and data is None]
        for number, (_, data) in enumerate(found):
            if data:
                yield Stored(f"{rows.label(place)}#{number}", len(data), partial(_octets, rows, place, keys, number))
    if folder is not None:
        yield from folder.stored(named, len(named))


def _octets(rows: ParquetRows, place: int, keys: Sequence[str], number: int) -> bytes:
    return pictures(rows[place], keys)[number][1] or b""


def _in_struct(row: Row, key: str, entry: Mapping[str, Any]) -> tuple[str | None, bytes | None]:
    """Path and bytes of an image struct."""
    path, data = entry.get("path"), entry.get("bytes")
    for part, value, kind in (("path", path, str), ("bytes", data, bytes)):
        if value is not None and not isinstance(value, kind):
            raise row.error(f"'{key}.{part}' is {describe(value)} instead of the image's", "repair or remove the row")
    return path, data


def open_picture(
    row: Row, picture: tuple[str | None, bytes | None], folder: ImageFolder | None, values: Range = None
) -> Image:
    """One image: its bytes, or the file its path names inside the image folder; `values` are black and white."""
    path, data = picture
    if data is not None:
        if not data:
            raise row.error("its image is empty", "repair or remove the row")
        try:
            return decode_image(io.BytesIO(data), path or "of the row", values)
        except DataError as error:
            raise DataError(f"{row.file}, {row.unit} {row.number}: {error}") from None
    if not path:
        raise row.error("its image has neither bytes nor a path", "repair or remove the row")
    if folder is None:
        raise row.error(f"its image is only the path '{path}'", "set data.images to the folder of the images")
    return folder.load(checked_image(row, path, folder))


def to_tar(path: str, folder: Path, rows: int = 2000) -> list[Path]:
    """Rewrite conversations in parquet as indexed tar shards (`vlmlab.data.readers.tar.TarShards`), images as they are.

    A shuffled order reads a whole row group for every row of a parquet file, and one row of a tar; worth it for sets
    that are read more than once from slow disks.

    Args:
        path: as of `LlavaParquet`.
        folder: where the shards go; made if it is not there.
        rows: rows of one shard.

    Raises:
        DataError: a row's image has no bytes.
    """
    source = ParquetRows(find_files(path, SUFFIXES))
    folder.mkdir(parents=True, exist_ok=True)

    def members(first: int) -> Iterator[tuple[str, bytes]]:
        for index in range(first, min(first + rows, len(source))):
            row = source[index]
            for number, (_, data) in enumerate(pictures(row, IMAGE_KEYS)):
                if data is None:
                    raise row.error("its image has no bytes", "give a set with the images inside")
                yield f"{index:09d}.{number}.jpg", data  # readers go by the content, not by the name
            yield f"{index:09d}.json", json.dumps(row.data, ensure_ascii=False).encode()

    starts = range(0, len(source), rows)
    return [write_shard(folder / f"train-{n:05d}.tar", members(start)) for n, start in enumerate(starts)]


def _paths(value: Any) -> list[str]:
    """The paths in an image struct or a list of them."""
    entries = value if isinstance(value, list) else [value]
    paths = (entry.get("path") for entry in entries if isinstance(entry, dict))
    return [path for path in paths if isinstance(path, str) and path]


class LlavaParquet:
    """Conversations with their images inside, as in LLaVA-ReCap and LLaVA-NeXT-Data; rows are read when asked for.

    A row has `conversations` (from/value, or the other forms of `LlavaJson`) and `image` or `images`: a struct
    {bytes, path}, a list of them, or null for a text. Opening costs the shards' footers alone (and the ids, for a
    split), whatever the size; a bad row shows when it is read.

    Args:
        path: a shard, a folder or a glob of shards, or an id of the hub.
        images: the image folder, for rows that have only paths; null: such rows cannot be used.
        split: train or val, or null for every row: by the files' names, otherwise by a hash of the row's id.
        size: only so many samples, chosen by seed; null for all.
        seed: of the choice of `size`.
        split_seed: of the split; apart from `seed`, so that runs with other seeds share their held-out rows.
        val_fraction: share of the ids that is held out.
        tags, prepend_images: see `vlmlab.data.readers.llava.LlavaFormat`.
        max_bad_fraction, verify: with `verify` all rows are read and decoded at once, and up to that share of bad ones
            is left out (for sets that are scored); 0: the first is an error.
        image_roots, image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the rows that were left out at construction.

    Raises:
        DataError: a shard cannot be used, or the split is empty.
        UserError: pyarrow is not installed.
    """

    def __init__(
        self,
        path: Text,
        images: Text | None = None,
        split: Split | None = None,
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.005,
        tags: Texts = (IMAGE_TAG,),
        prepend_images: bool = False,
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_roots: Texts = (),
        image_range: Levels = "auto",
    ) -> None:
        check_split(split, val_fraction, 0.0)
        _arrow()
        files, shares = split_files(find_files(path, SUFFIXES), split, val_fraction, 0.0)
        self._rows = ParquetRows(files)
        if not any(key in self._rows.columns for key in TURN_KEYS):
            columns = listed(self._rows.columns)
            raise DataError(f"{path} has no column '{TURN_KEYS[0]}' (columns: {columns}); choose the data=... it is of")
        self._form = LlavaFormat(tuple(tags), prepend_images)
        self._folder = ImageFolder(images, image_roots, image_range) if images is not None else None
        self._values = value_range(image_range)
        self._index: Sequence[int] | NDArray[np.int64] = range(len(self._rows))
        if shares is not None:
            keep = [split_of(name, *shares, split_seed) == split for name in together(self._split_by())]
            self._index = np.flatnonzero(np.array(keep, dtype=bool))
        if not len(self._index):
            remedy = "raise data.val_fraction, or give more rows"
            raise DataError(f"{path} has no row for the split '{split}' ({len(self._rows)} in all); {remedy}")
        if size is not None:
            labels = [self._rows.label(int(i)) for i in self._index]
            self._index = np.array([self._index[i] for i in subset(labels, size, seed)])
        row_filter = RowFilter(max_bad_fraction)
        if verify:
            row_filter.seen = len(self._index)
            self._index = verified([int(i) for i in self._index], row_filter, self._sample, self._rows.label)
        self.skipped = row_filter.finish(path)

    def _split_by(self) -> list[list[str]]:
        """What a row is split by: its id, as conversations about one image mostly share it, and its images' paths."""
        columns = ["id"] if self._rows.has("id") else []
        found: list[list[str]] = [[self._rows.label(i)] for i in range(len(self._rows))]
        for i, row in enumerate(self._rows.read(columns) if columns else ()):
            if row["id"] is not None:
                found[i] = [str(row["id"])]
        for column in self._rows.paths(IMAGE_KEYS):
            key = column.partition(".")[0]
            named = [_paths(row.get(key)) for row in self._rows.read([column])]
            if len({path for paths in named for path in paths}) > 1:  # one word for all images tells nothing
                for members, paths in zip(found, named, strict=True):
                    members += [f"image {posixpath.normpath(path)}" for path in paths]
        return found

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(int(self._index[index]))

    def stored(self, most: int) -> Iterator[Stored]:
        """Its images as they are kept."""
        keys = [key for key in IMAGE_KEYS if key in self._rows.columns]
        return stored_pictures(self._rows, spread(map(int, self._index), most), keys, self._folder)

    def fingerprint(self) -> Facts:
        """Facts that change with the content of its files, and of image files that rows only name."""
        shards = shards_fingerprint(self._rows.files)
        return shards if self._folder is None else shards | self._folder.fingerprint(self._named())

    def _named(self) -> Iterator[str]:
        """The image files that rows name."""
        keys = [key for key in IMAGE_KEYS if key in self._rows.columns]
        columns = [f"{key}.path" if self._rows.has(f"{key}.path") else key for key in keys]
        for number, data in enumerate(self._rows.read(columns), 1):
            with contextlib.suppress(DataError):  # a row without a usable image is skipped when it is read
                yield from (path for path, _ in pictures(Row(self._rows.files[0], number, data), keys) if path)

    def label(self, index: int) -> str:
        """The id of a sample, without loading it: shard and row, since the rows' own ids are not unique."""
        return self._rows.label(int(self._index[index]))

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, its images read with the row but not decoded."""
        return self._record(self._rows[int(self._index[index])])[0].turns

    def _record(self, row: Row) -> tuple[Conversation, list[tuple[str | None, bytes | None]]]:
        """What a row says, and its images as they are there."""
        found = pictures(row, IMAGE_KEYS)
        return parse_turns(row, self._form, len(found)), found

    def _sample(self, place: int) -> Sample:
        row, name = self._rows[place], self._rows.label(place)
        record, found = self._record(row)
        images = tuple(open_picture(row, one, self._folder, self._values) for one in found)
        return Sample(name, images, record.turns, record.system, tuple(f"{name}#{k}" for k in range(len(found))))


class VqaParquet:
    """Questions with their images inside, as the hub keeps PathVQA, VQA-RAD and SLAKE.

    The text of all rows is read and checked at once, an image when its question is asked for.

    Args:
        path: a shard, a folder or a glob of shards, or an id of the hub; files named after a split are that split.
        split: train, val, test, or null for every row; a split without files is taken out of train by image.
        multi_turn: the questions of one image as one conversation (training) instead of one sample each (benchmark).
        max_turns: most questions in one conversation; more are dealt evenly over several.
        size: only so many samples, chosen by seed; null for all.
        seed: of the questions' order inside a conversation and of the choice of `size`.
        split_seed: of the split by image; apart from `seed`, so that runs with other seeds share their test split.
        val_fraction, test_fraction: shares of the images where there are no files for a split.
        where: keep only rows whose column has one of these values, such as {q_lang: [en]}.
        image_key: column of the image.
        question_key, id_key, answer_key, answers_key, kind_keys, suffix: see `vqa.VqaFormat`.
        max_bad_fraction: share of the rows that may be unusable and are left out; 0: the first is an error.
        verify: decode all images at once, to leave out questions about broken ones (for sets that are scored).
        image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the rows that were left out.

    Raises:
        DataError: a shard or a row cannot be used, or the split is empty.
        UserError: pyarrow is not installed.
    """

    turns_in_memory = True

    def __init__(
        self,
        path: Text,
        split: Split | None = None,
        multi_turn: bool = True,
        max_turns: Width = 8,
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        test_fraction: Share = 0.1,
        where: Mapping[str, Sequence[Any]] | None = None,
        image_key: Text = "image",
        question_key: Text = "question",
        id_key: Text | None = None,
        answer_key: Text = "answer",
        answers_key: Text = "answers",
        kind_keys: Texts = ("answer_type", "question_type"),
        suffix: str = "",
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_range: Levels = "auto",
    ) -> None:
        check_split(split, val_fraction, test_fraction)
        _arrow()
        files, shares = split_files(find_files(path, SUFFIXES), split, val_fraction, test_fraction)
        self._rows, self._key, self._values = ParquetRows(files), image_key, value_range(image_range)
        self._check_columns(path, question_key)
        form = VqaFormat(image_key, question_key, id_key, answer_key, answers_key, tuple(kind_keys), suffix)
        row_filter = RowFilter(max_bad_fraction)
        rows = self._texts()
        rows = [row for row in rows if all(row.data.get(k, v[0]) in v for k, v in (where or {}).items())]
        named, names = split if shares is not None else None, image_words(rows, form)
        rows = choose_rows(rows, names, named, (), shares or (0.0, 0.0), split_seed, row_filter)
        asked = unique_questions(rows, form, None, row_filter)
        row_filter.finish(path)
        self._place = {question.id: int(row.data["_place"]) for row, question in asked}
        questions = [question for _, question in asked]
        if verify:
            questions = verified(
                questions, row_filter, lambda q: self._picture(self._place[q.id]), lambda q: q.id, lambda q: q.image
            )
        self.skipped = row_filter.finish(path)
        groups = conversations(questions, max_turns, seed) if multi_turn else [(q.id, (q,)) for q in questions]
        self._groups: list[tuple[str, tuple[Question, ...]]]
        self._groups = [groups[i] for i in subset([name for name, _ in groups], size, seed)]

    def _check_columns(self, path: str, question_key: str) -> None:
        for key in (self._key, question_key):
            if key not in self._rows.columns:
                columns = listed(self._rows.columns)
                raise DataError(f"{path} has no column '{key}' (columns: {columns}); set its name, or another data=...")

    def _texts(self) -> list[Row]:
        """Every row without its pixels; under the image's key is what tells its image from others."""
        others = [name for name in self._rows.columns if name != self._key]
        rows = []
        for place, (data, name) in enumerate(zip(self._rows.read(others), self._image_names(), strict=True)):
            file, number = self._rows.at(place)
            rows.append(Row(file, number, {**data, self._key: name, "_place": place}))
        return rows

    def _image_names(self) -> Iterator[str]:
        """The images' paths where they tell them apart, otherwise a hash of their bytes."""
        if self._rows.has(f"{self._key}.path"):
            paths = [_paths(row.get(self._key)) for row in self._rows.read([f"{self._key}.path"])]
            if all(paths) and len({path for path, *_ in paths}) > 1:
                return iter([posixpath.normpath(path) for path, *_ in paths])
        values = (row.get(self._key) for row in self._rows.read([self._key]))
        images = (value.get("bytes") if isinstance(value, dict) else value for value in values)
        return (hashlib.sha256(data).hexdigest()[:16] if isinstance(data, bytes) and data else "" for data in images)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        name, questions = self._groups[index]
        picture = self._picture(self._place[questions[0].id])
        return Sample(name, (picture,), self.turns(index), image_ids=(questions[0].image,))

    def stored(self, most: int) -> Iterator[Stored]:
        """Its images as they are kept, each once."""
        asked = sorted((self._place[q.id], q.image) for _, group in self._groups for q in group)
        first = {image: place for place, image in reversed(asked)}
        return stored_pictures(self._rows, sorted(spread(first.values(), most)), (self._key,))

    def fingerprint(self) -> Facts:
        """Facts that change with the content of its files."""
        return shards_fingerprint(self._rows.files)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its image."""
        return tuple(question.turn() for question in self._groups[index][1])

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return self._groups[index][0]

    def _picture(self, place: int) -> Image:
        row = self._rows[place]
        found = pictures(row, (self._key,))
        if len(found) != 1:
            raise row.error(f"has {len(found)} images where one is needed", "repair or remove the row")
        return open_picture(row, found[0], None, self._values)

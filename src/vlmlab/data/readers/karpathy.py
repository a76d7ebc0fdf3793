"""Captions with the Karpathy split: dataset_coco.json and dataset_flickr30k.json, and Flickr30k's tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import DataError, listed, reason
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts
from vlmlab.data.images import ImageFolder
from vlmlab.data.readers.captions import Captioned, CaptionSamples
from vlmlab.data.readers.place import find_files
from vlmlab.data.readers.records import Row, checked_image, parse_json, read_each, read_text
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, named_split, split_of

SUFFIXES = (".json", ".csv", ".token")
RESTVAL = "restval"
"""COCO's validation images beyond the 5,000 of val and 5,000 of test (Karpathy and Fei-Fei, arXiv 1412.2306); papers
train on them."""


EMPTY = ("", "nan", "-nan", "<na>", "nat", "none", "null", "inf", "-inf", "infinity")
"""What a cell of a table holds where nothing, or no number, was written."""


class KarpathyCaptions(CaptionSamples):
    """Captions as samples; the file is read and checked at once, pixels when a sample is asked for.

    Args:
        path: dataset_coco.json or dataset_flickr30k.json (`images[]` with filename, perhaps filepath, split and
            sentences[] with raw); or a table of Flickr30k: flickr_annotations_30k.csv (raw, sentids, split, filename),
            results.csv (image_name| comment_number| comment) or results_20130124.token, the last two without a split.
        images: the image folder; for COCO the one that holds train2014 and val2014.
        split: train, val, test, or null for every image.
        restval: whether COCO's "restval" images are part of train; false: they are left out.
        all_references: one sample per image with all its captions as references (benchmark) instead of one per
            caption (training).
        prompt: the caption instruction.
        size: only so many samples, chosen by seed; null for all.
        seed: of the choice of `size`.
        split_seed: of the split by image, where the file has none.
        val_fraction, test_fraction: shares of the images, likewise.
        max_bad_fraction: share of the images that may be unusable and are left out; 0: the first is an error.
        verify: decode all images at once, to leave out the broken ones (for sets that are scored).
        image_roots, image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the images that were left out.

    Raises:
        DataError: the file, the folder or a row cannot be used, or the split is empty.
    """

    def __init__(
        self,
        path: Text,
        images: Text,
        split: Split | None = None,
        restval: bool = True,
        all_references: bool = False,
        prompt: str = "Describe the picture briefly.",
        size: Count | None = None,
        seed: Seed = 0,
        split_seed: Seed = 0,
        val_fraction: Share = 0.05,
        test_fraction: Share = 0.1,
        max_bad_fraction: Share = 0.0,
        verify: bool = False,
        image_roots: Texts = (),
        image_range: Levels = "auto",
    ) -> None:
        check_split(split, val_fraction, test_fraction)
        folder = ImageFolder(images, image_roots, image_range)
        fractions = (val_fraction, test_fraction)
        row_filter = RowFilter(max_bad_fraction)
        found: list[Captioned] = []
        files = find_files(path, SUFFIXES)
        for file in files:
            found += row_filter.keep(row_filter.rows(_rows(file)), lambda row: parse_captioned(row, folder))
        row_filter.finish(path)
        kept = found if split is None else _of_split(found, folder, split, restval, fractions, split_seed)
        if not kept:
            raise DataError(f"{path} has no image for the split '{split}' ({len(found)} in all); give the whole file")
        if verify:
            kept = verified(kept, row_filter, lambda c: folder.load(c.image), lambda c: c.id)
        self.skipped = row_filter.finish(path)
        super().__init__(kept, files, folder, prompt, all_references, size, seed)


def parse_captioned(row: Row, folder: ImageFolder) -> Captioned:
    """One image, checked; raises DataError (file, row, key, remedy) where it cannot be used."""
    name = row.text(row.get("filename"), "filename")
    if row.data.get("filepath"):
        name = f"{row.text(row.data['filepath'], 'filepath').rstrip('/')}/{name}"
    name = checked_image(row, name, folder)
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise row.error("'sentences' is not a list of captions", "fill it in or remove the row")
    captions = []
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, dict):
            raise row.error(f"sentence {number + 1} is not an object", "repair or remove the row")
        id_ = _id(row, sentence.get("sentid"), f"sentid of sentence {number + 1}")
        text = row.untagged(sentence.get("raw"), f"raw of sentence {number + 1}")
        captions.append((id_ or f"{name}#{number}", text))
    key = next((key for key in ("cocoid", "imgid", "img_id") if row.data.get(key) is not None), "cocoid")
    return Captioned(_id(row, row.data.get(key), key) or name, name, tuple(captions), _word(row))


def _id(row: Row, value: object, key: str) -> str | None:
    """An id as text; None where there is none."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return None if value is None else str(value)
    return row.text(value, key)


def _word(row: Row) -> str:
    """The file's own word for an image's split; "" where it has none."""
    word = row.data.get("split")
    word = row.text(word, "split").lower() if word not in (None, "") else ""
    if word not in ("", RESTVAL) and named_split(word) is None:
        raise row.error(f"'split' is '{word}', no known split", f"use train, val, test or {RESTVAL}")
    return word


def _of_split(
    found: Sequence[Captioned],
    folder: ImageFolder,
    split: str,
    restval: bool,
    fractions: tuple[float, float],
    seed: int,
) -> list[Captioned]:
    """The images of a split: by the file's word, or by a hash of the name where it has none."""
    same = folder.same(c.image for c in found if not c.split)

    def of(item: Captioned) -> str | None:
        if not item.split:
            return split_of(same[item.image], *fractions, seed)
        if item.split == RESTVAL:
            return "train" if restval else None
        return named_split(item.split)

    return [c for c in found if of(c) == split]


def _rows(file: Path) -> Iterator[Row | DataError]:
    """The images of a file, all in the form of dataset_coco.json."""
    if file.suffix.lower() == ".json":
        return read_each(file, ("images",))
    return _tabled(file)


def _tabled(file: Path) -> Iterator[Row | DataError]:
    text = read_text(file)
    if file.suffix.lower() == ".token":
        lines = (line.rstrip("\r").partition("\t") for line in text.split("\n") if line.strip())
        return _grouped(file, ((number, name, words) for number, (name, _, words) in enumerate(lines, 1)))
    lines_of_text = io.StringIO(text, newline="")
    if "|" in text.partition("\n")[0]:  # quotes are words there
        table = csv.DictReader(lines_of_text, delimiter="|", quoting=csv.QUOTE_NONE)
    else:
        table = csv.DictReader(lines_of_text)
    header = [(name or "").strip() for name in table.fieldnames or ()]
    table.fieldnames = header
    try:
        cells = list(enumerate(table, 1))
    except csv.Error as error:
        raise DataError(
            f"Data file {file} is not a table of comma-separated values ({reason(error)}); repair it"
        ) from None
    if {"raw", "filename"} <= set(header):
        return (_annotated(Row(file, number, dict(line))) for number, line in cells)
    if {"image_name", "comment"} <= set(header):
        return _grouped(file, ((n, (r["image_name"] or "").strip(), r["comment"] or "") for n, r in cells))
    raise DataError(
        f"Data file {file} has the columns {listed(header)}; it needs raw and filename, or image_name and comment"
    )


def _annotated(row: Row) -> Row | DataError:
    """A row of flickr_annotations_30k.csv, whose lists are JSON inside a cell."""
    try:
        raw, ids = parse_json(row.data["raw"]), parse_json(row.data.get("sentids") or "[]")
    except (TypeError, ValueError, RecursionError):
        return row.error("'raw' or 'sentids' is not a JSON list", "repair or remove the row")
    if not isinstance(raw, list) or not isinstance(ids, list):
        return row.error("'raw' or 'sentids' is not a JSON list", "repair or remove the row")
    sentences = [{"raw": text, "sentid": ids[n] if n < len(ids) else None} for n, text in enumerate(raw)]
    return Row(row.file, row.number, {**row.data, "sentences": sentences})


def _grouped(file: Path, lines: Iterator[tuple[int, str, str]]) -> Iterator[Row | DataError]:
    """One row per image out of one line per caption; a caption that is missing makes its line a bad row."""
    by_image: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    bad: list[Row | DataError] = []
    for number, name, words in lines:
        image = name.partition("#")[0].strip()
        if image.lower() in EMPTY or words.strip().lower() in EMPTY:
            row = Row(file, number, {}, "line")
            bad.append(row.error("has no image name or no caption", "repair or remove the line"))
            continue
        by_image.setdefault(image, (number, []))[1].append({"raw": words})
    rows = (Row(file, n, {"filename": image, "sentences": made}) for image, (n, made) in by_image.items())
    return iter([*bad, *rows])

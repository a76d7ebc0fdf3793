"""Image captions in the COCO captions format: one JSON object with `images` and `annotations`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmlab.contracts.errors import DataError, listed
from vlmlab.contracts.values import Count, Levels, Seed, Share, Text, Texts
from vlmlab.data.images import ImageFolder
from vlmlab.data.readers.captions import Captioned, CaptionSamples
from vlmlab.data.readers.records import Row, checked_image, describe, each_row, read_json
from vlmlab.data.readers.row_filter import RowFilter, verified
from vlmlab.data.readers.split import Split, check_split, split_of


def _number(row: Row, key: str) -> str:
    """An id as text; COCO has numbers, derived sets have texts."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return row.text(value, key)


def parse_image(row: Row, folder: ImageFolder) -> tuple[str, str]:
    """Id and file name of a row of `images`; raises DataError where it cannot be used."""
    name = row.text(row.get("file_name"), "file_name")
    return _number(row, "id"), checked_image(row, name, folder)


def parse_caption(row: Row) -> tuple[str, str, str]:
    """Annotation id, image id and caption (without outer blanks) of a row of `annotations`; raises DataError."""
    return _number(row, "id"), _number(row, "image_id"), row.untagged(row.get("caption"), "caption")


class CocoCaptions(CaptionSamples):
    """Captions as samples; the file is read and checked at once, pixels when a sample is asked for.

    Without `test_path`, train, val and test are drawn from `path` by a hash of the image's file name; with it, the
    whole of that file is the test split. Images without captions are left out.

    Args:
        path: the captions file (`images[]` with id and file_name, `annotations[]` with id, image_id and caption).
        images: the image folder; file names are relative to it.
        split: train, val, test, or null for every image of `path`.
        test_path: a captions file that is the test split, such as captions_val2017.json.
        test_images: its image folder; null is `images`.
        all_references: one sample per image with all its captions as references (benchmark) instead of one per
            caption (training).
        prompt: the caption instruction.
        size: only so many samples, chosen by seed; null for all.
        seed: of the choice of `size`.
        split_seed: of the split by image; apart from `seed`, so that runs with other seeds share their test split.
        val_fraction, test_fraction: shares of the images.
        max_bad_fraction: share of the rows that may be unusable and are left out; 0: the first is an error. The
            captions of an image that is left out go with it.
        verify: decode all images at once, to leave out the broken ones (for sets that are scored).
        image_roots, image_range: see `vlmlab.data.images.ImageFolder`.

    Attributes:
        skipped: the rows that were left out.

    Raises:
        DataError: the file, the folder or a row cannot be used, or the split is empty.
    """

    def __init__(
        self,
        path: Text,
        images: Text,
        split: Split | None = None,
        test_path: Text | None = None,
        test_images: Text | None = None,
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
        row_filter = RowFilter(max_bad_fraction)
        if test_path is not None and split == "test":
            folder = ImageFolder(images if test_images is None else test_images, image_roots, image_range)
            file = Path(test_path).expanduser()
            found = read_captions(file, folder, row_filter)
        else:
            folder = ImageFolder(images, image_roots, image_range)
            file = Path(path).expanduser()
            fractions = (val_fraction, 0.0 if test_path is not None else test_fraction)
            found = _of_split(file, folder, read_captions(file, folder, row_filter), split, fractions, split_seed)
        if verify:
            found = verified(found, row_filter, lambda c: folder.load(c.image), lambda c: c.id)
        self.skipped = row_filter.finish(path)
        super().__init__(found, [file], folder, prompt, all_references, size, seed)


def read_captions(file: Path, folder: ImageFolder, row_filter: RowFilter | None = None) -> list[Captioned]:
    """All images of a captions file that have captions, in the file's order.

    Raises:
        DataError: the file cannot be used; a row of it, and the filter lets none through (as without one).
    """
    row_filter = row_filter if row_filter is not None else RowFilter(0.0)
    content = read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        found = f"keys: {listed(content)}" if isinstance(content, dict) else describe(content)
        needed = "it needs the lists 'images' and 'annotations'"
        raise DataError(f"Data file {file} is not in COCO captions format ({found}); {needed}")
    names: dict[str, str] = {}
    known: set[str] = set()

    def image(row: Row) -> None:
        if "id" in row.data:
            known.add(str(row.data["id"]))
        id_, name = parse_image(row, folder)
        if id_ in names:
            raise row.error(f"image id {id_} occurs twice", "make the ids unique")
        names[id_] = name

    row_filter.keep(row_filter.rows(each_row(file, content["images"], "'images'", "row of 'images'")), image)
    captions: dict[str, list[tuple[str, str]]] = {id_: [] for id_ in names}
    seen: set[str] = set()

    def caption(row: Row) -> None:
        id_, image_id, text = parse_caption(row)
        if image_id not in known:
            raise row.error(f"image_id {image_id} is not an image of the file", "add the image or remove the caption")
        if id_ in seen:
            raise row.error(f"annotation id {id_} occurs twice", "make the ids unique")
        seen.add(id_)
        if image_id in names:  # that of an image which is left out goes with it
            captions[image_id].append((id_, text))

    row_filter.keep(
        row_filter.rows(each_row(file, content["annotations"], "'annotations'", "row of 'annotations'")), caption
    )
    row_filter.finish(file)
    return [Captioned(id_, names[id_], tuple(texts)) for id_, texts in captions.items() if texts]


def _of_split(
    file: Path,
    folder: ImageFolder,
    found: Sequence[Captioned],
    split: str | None,
    fractions: tuple[float, float],
    seed: int,
) -> list[Captioned]:
    same = folder.same(c.image for c in found) if split is not None else {}
    kept = [c for c in found if split is None or split_of(same[c.image], *fractions, seed) == split]
    if not kept:
        problem = f"has no captioned image for the split '{split}' ({len(found)} in all)"
        raise DataError(f"Data file {file} {problem}; raise the split's fraction or give a larger file")
    return kept

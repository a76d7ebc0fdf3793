"""Image files of a folder as uint8 RGB arrays: odd formats converted by fixed rules, every bad file named."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import IO, Any, cast

from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from vlmlab.contracts.errors import DataError, UserError, reason
from vlmlab.contracts.sample import Image
from vlmlab.data.fingerprint import Facts, images_fingerprint
from vlmlab.data.overlap import Stored, spread
from vlmlab.data.pixels import Range, from_halves, from_pillow, lower_bytes, raw_mode, value_range

MAX_PIXELS = 89_478_485
"""Images that claim more pixels are refused before decoding (Pillow's own threshold of a warning: 256 MiB of RGB)."""

FORMATS = ("BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Decoders in use (JPEG reads MPO too). Others stay shut: EPS starts another program, the rest are not photographs."""

MAX_SIDE = 65_535
"""Rows or columns of an image at most, as in a JPEG; more of them in a line would cost memory in scaling alone."""

MOST_READS = 2_000_000
"""Pieces that a file may be read in: a comment, a table or a list of frames that has more takes for ever."""

MOST_SCANS = 20
"""Times that all `MAX_PIXELS` may be gone over by the scans of progressive JPEGs; cameras use about ten."""

SPARE_BYTES = 64 * 2**20
"""Bytes of a file beyond 16 a pixel: profiles, thumbnails, notes. Files of many pages may have more."""

MOST_AT_ONCE = 2**29
"""Bytes of a file that is read as a whole before its size in pixels is known, as WebP is."""

PAGED = ("GIF", "TIFF")
"""Formats whose first page is read alone, wherever it is, however large the file."""

MOST_PLAIN = 2**23
"""Numbers of an image that is written in decimal digits, which Pillow reads one by one."""

ENDINGS = (".jpg", ".jpeg", ".png")
"""What a name without an ending may stand for, as GQA's image ids do."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def embedded(name: str) -> str | None:
    """Why a name can be none of a file: the image itself, or where it is on the net; None where it can be one."""
    if name[:5].lower() == "data:":
        return "is a data URI, and images inside the text are not supported"
    return "is a URL, and images are not downloaded" if _URL.match(name) else None


class ImageFolder:
    """The one folder images may come from; names are relative to it and may not lead out of it.

    Args:
        root: the folder; it may itself be a link.
        roots: folders that links inside `root` may lead to; none: no link is followed.
        values: which values are black and white in images of more than 8 bits: "auto" or [low, high].

    Raises:
        DataError: the folder, or one of `roots`, does not exist.
        UserError: `values` is not a range.
    """

    def __init__(
        self, root: str | Path, roots: str | Sequence[str | Path] = (), values: str | Sequence[float] = "auto"
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"Image folder {self.root} does not exist; set data.images to the folder of the images")
        self._real = os.path.realpath(self.root)
        self._roots = [os.path.realpath(folder) for folder in _folders(roots)]
        self._values = value_range(values)
        self._inside: dict[str, bool] = {}  # whether a sub-folder is reached without links, asked once

    def name(self, given: str) -> str:
        """The normal form of an image's name: one for ``a.png``, ``./a.png``, ``.//a.png`` and ``b/../a.png``.

        A name without an ending is that of the one file that has it and an ending of `ENDINGS`.
        """
        plain = posixpath.normpath(given.strip()) if given.strip() else ""
        if "." not in posixpath.basename(plain) and "\0" not in plain and not os.path.lexists(self.root / plain):
            found = [plain + ending for ending in ENDINGS if os.path.isfile(self.root / (plain + ending))]
            return found[0] if len(found) == 1 else plain
        return plain

    def same(self, names: Iterable[str]) -> dict[str, str]:
        """Every name -> the one that stands for its file, the first in the alphabet of all that lead there.

        So a file is one image however it is spelled: by case where the file system has none, by links.
        """
        plain = {given: self.name(given) for given in set(names)}
        files = {name: self._file(name) for name in set(plain.values())}
        first: dict[object, str] = {}
        for name, file in files.items():
            first[file] = min(first.get(file, name), name)
        return {given: first[files[name]] for given, name in plain.items()}

    def check(self, given: str) -> str | None:
        """Why the image cannot be used, in words that follow its name, or None; does not open the file."""
        if not given.strip() or "\0" in given:
            return "is not a file name"
        if reason := embedded(given) or self._outside(given):
            return reason
        path = os.path.join(self.root, self.name(given))
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode) or not self._without_links(os.path.dirname(path)):
                if reason := self._refused_link(path, found):
                    return reason
                found = os.stat(path)
        except (OSError, ValueError):
            return f"is not in {self.root}{self._hint(given)}"
        if not stat.S_ISREG(found.st_mode):
            return "is not a file"
        return None if found.st_size else "is an empty file"

    def stored(self, names: Iterable[str], most: int) -> Iterator[Stored]:
        """At most so many of these image files, for comparing; those that are gone are left out."""
        for name in spread(names, most):
            path = self.root / name
            try:
                size = path.stat().st_size
            except OSError:
                continue
            yield Stored(name, size, path.read_bytes)

    def fingerprint(self, names: Iterable[str]) -> Facts:
        """Facts that change with these images; none is opened."""
        return images_fingerprint(self.root, (self.name(name) for name in set(names)))

    def load(self, name: str) -> Image:
        """The image as (H, W, 3) uint8; raises DataError naming the file where it cannot be used."""
        reason = self.check(name)
        if reason:
            raise DataError(f"Image '{name}' {reason}; correct the row or the image folder")
        path = self.root / self.name(name)
        try:
            with open(path, "rb", opener=_at_once) as file:
                return decode_image(file, str(path), self._values)
        except OSError as error:  # decoding raises none
            raise DataError(f"Image {path} cannot be read ({error.strerror}); check its permissions") from None

    def _outside(self, given: str) -> str | None:
        if given.startswith("/") or PureWindowsPath(given).drive or PureWindowsPath(given).root:
            return f"is an absolute path, only names inside {self.root} are allowed"
        if ".." in PureWindowsPath(self.name(given)).parts:  # splits at both / and \
            return f"leaves the image folder {self.root}"
        return None

    def _refused_link(self, path: str, found: os.stat_result) -> str | None:
        """Why a path with a link in it may not be followed."""
        if self._roots:
            real = os.path.realpath(path)
            if any(os.path.commonpath([real, root]) == root for root in (self._real, *self._roots)):
                return None
            return "leads out of the folders that data.image_roots names"
        which = "is a link" if stat.S_ISLNK(found.st_mode) else "is behind a linked folder"
        return f"{which}, only files that lie inside {self.root} are allowed (data.image_roots names further folders)"

    def _file(self, name: str) -> object:
        """What is equal for two names of one file: device and number, or the name where there is no such file."""
        try:
            if embedded(name) or self._outside(name):
                return name
            found = os.stat(self.root / name)
        except (OSError, ValueError):
            return name
        return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(self.root / name)

    def _without_links(self, folder: str) -> bool:
        if folder not in self._inside:
            plain = os.path.normpath(os.path.join(self._real, os.path.relpath(folder, self.root)))
            self._inside[folder] = os.path.realpath(folder) == plain
        return self._inside[folder]

    def _hint(self, name: str) -> str:
        """The usual mistake: data.images is one folder too deep or too shallow."""
        real = Path(self._real)
        for folder in (real.parent, real / "images", *real.parents[1:2]):
            if os.path.isfile(folder / name):  # False, never an error, for impossible names
                return f" (but it is in {folder})"
        return ""


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for a writer, should a pipe have taken the place of the file."""
    return os.open(path, flags | os.O_NONBLOCK)


def _folders(given: str | Sequence[str | Path]) -> list[Path]:
    """The folders that `data.image_roots` names."""
    found = [Path(folder).expanduser() for folder in ([given] if isinstance(given, str | Path) else given or ())]
    for folder in found:
        if not folder.is_dir():
            raise DataError(f"data.image_roots names {folder}, which is not a folder; give those that links lead to")
    return found


def load_image(path: str, root: str | Path, values: str | Sequence[float] = "auto") -> Image:
    """One image file as (H, W, 3) uint8 RGB, the same on every machine with the same Pillow.

    Rules: the EXIF or XMP orientation is applied; of animations and multi-page files the first frame counts;
    transparency is laid on white; CMYK, palette, grey and bilevel images become RGB; 16 bit pixels are scaled by their
    full range (that of the TIFF's bit depth), floating point by 1, 255 or 65535, whichever is the smallest that holds
    them, both by `values` where it is given. Broken metadata around sound pixels is ignored.

    Args:
        path: the image's name relative to `root`.
        root: the folder that holds all images.
        values: which values are black and white where a pixel has more than 8 bits: "auto" or [low, high]; what lies
            outside is cut off. X-rays of 12 bits in files of 16 need [0, 4095] for their contrast.

    Raises:
        DataError: absent, empty, truncated or not an image; more than `MAX_PIXELS`; a path that leaves `root`.
        UserError: `values` is not a range.
    """
    return ImageFolder(root, values=values).load(path)


def named_image(given: str | Path, values: str | Sequence[float] = "auto") -> Image:
    """The image of a path that a user gives, wherever it is; links are followed.

    Raises:
        UserError: there is no such file, or `values` is not a range.
        DataError: as ``load_image``.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of an image, a Pillow image, or None for no image.")
    real = path.resolve()
    return load_image(real.name, real.parent, values)


def decode_image(file: IO[bytes], name: str, values: Range = None) -> Image:
    """An open image file as (H, W, 3) uint8 RGB by the rules of `load_image`; `name` is what errors call it.

    Raises:
        DataError: empty, truncated or not an image; more than `MAX_PIXELS` or `MAX_SIDE`; more than the memory holds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata; the size has its own limit below
            return _decoded(file, values)
    except Pillow.DecompressionBombError:
        limit = f"more than {MAX_PIXELS:,} pixels or {MAX_SIDE:,} in a line"
        raise DataError(f"Image {name} claims {limit}; shrink it or remove its row") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DataError(f"Image {name} is not a readable image ({known}); replace the file or remove its row") from None
    except MemoryError:
        raise DataError(f"Image {name} does not fit the memory; shrink it or remove its row") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise DataError(
            f"Image {name} cannot be decoded ({reason(error)}); replace the file or remove its row"
        ) from None


def _decoded(opened: IO[bytes], values: Range) -> Image:
    file = cast("IO[bytes]", _Counted(opened))
    with Pillow.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise Pillow.DecompressionBombError
        _check_effort(image, opened)
        lower = lower_bytes(image, values)
        if lower is None:
            return from_pillow(image, values)
        grey = raw_mode(image.tile[0]).startswith("LA")
        image.load()
        file.seek(0)
        with Pillow.open(file, formats=FORMATS) as again:
            again.tile = lower
            again.load()
            return from_halves(image, again, grey, values)


class _Counted:
    """An open file that is not read in more than `MOST_READS` pieces, nor `MOST_AT_ONCE` at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._reads = file, 0

    def read(self, size: int = -1) -> bytes:
        """As of a file.

        Raises:
            ValueError: once too often, or too much.
        """
        if size < 0:
            size = MOST_AT_ONCE + 1
        self._reads += 1
        if self._reads > MOST_READS:
            raise ValueError(f"it has more than {MOST_READS:,} pieces")
        data = self._file.read(size)
        if len(data) > MOST_AT_ONCE:
            raise ValueError(f"it has more than {MOST_AT_ONCE:,} bytes")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _check_effort(image: Pillow.Image, file: IO[bytes]) -> None:
    """Refuse what decodes for minutes: a small image before gigabytes, endless scans, millions of decimal numbers.

    Raises:
        ValueError: saying which.
    """
    pixels, place = image.size[0] * image.size[1], file.tell()
    size = file.seek(0, os.SEEK_END)
    if image.format not in PAGED and size > 16 * pixels + SPARE_BYTES:
        raise ValueError(f"{size:,} bytes are too many for {pixels:,} pixels")
    if image.info.get("progressive"):
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        if scans * pixels > MOST_SCANS * MAX_PIXELS:
            raise ValueError(f"it has {scans:,} scans")
    file.seek(place)
    tile = getattr(image, "tile", None)
    if tile and tile[0][0] == "ppm_plain" and pixels * len(image.getbands()) > MOST_PLAIN:
        raise ValueError(f"more than {MOST_PLAIN:,} decimal numbers: write it as binary")

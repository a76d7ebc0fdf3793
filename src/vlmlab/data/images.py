"""Image files of a folder as uint8 RGB arrays: odd formats converted by fixed rules, every bad file named."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Image
from vlmlab.data.fingerprint import Facts, images_fingerprint

MAX_PIXELS = 89_478_485
"""Images that claim more pixels are refused before decoding (Pillow's own threshold of a warning: 256 MiB of RGB)."""

FORMATS = ("BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Decoders in use (JPEG reads MPO too). Others stay shut: EPS starts another program, the rest are not photographs."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258


class ImageFolder:
    """The one folder images may come from; names are relative to it and may not lead out of it.

    Args:
        root: the folder; it may itself be a link.

    Raises:
        DataError: the folder does not exist.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"Image folder {self.root} does not exist; set data.images to the folder of the images")
        self._real = os.path.realpath(self.root)
        self._inside: dict[str, bool] = {}  # whether a sub-folder is reached without links, asked once

    def check(self, name: str) -> str | None:
        """Why the image cannot be used, in words that follow its name, or None; does not open the file."""
        if not name or "\0" in name:
            return "is no file name"
        if name.startswith("/") or PureWindowsPath(name).drive or PureWindowsPath(name).root:
            return f"is an absolute path, only names inside {self.root} are allowed"
        if ".." in PureWindowsPath(name).parts:  # splits at both / and \
            return f"leaves the image folder {self.root}"
        path = os.path.join(self.root, name)
        try:
            found = os.lstat(path)
        except (OSError, ValueError):
            return f"is not in {self.root}{self._hint(name)}"
        if stat.S_ISLNK(found.st_mode):
            return f"is a link, only files that lie inside {self.root} are allowed"
        if not self._without_links(os.path.dirname(path)):
            return f"is behind a linked folder, only files that lie inside {self.root} are allowed"
        if not stat.S_ISREG(found.st_mode):
            return "is not a file"
        return None if found.st_size else "is an empty file"

    def fingerprint(self, names: Iterable[str]) -> Facts:
        """Facts that change with these images; none is opened."""
        return images_fingerprint(self.root, names)

    def load(self, name: str) -> Image:
        """The image as (H, W, 3) uint8; raises DataError naming the file where it cannot be used."""
        reason = self.check(name)
        if reason:
            raise DataError(f"Image '{name}' {reason}; correct the row or the image folder")
        path = self.root / name
        try:
            with open(path, "rb") as file:
                return decode_image(file, str(path))
        except OSError as error:  # decoding raises none
            raise DataError(f"Image {path} cannot be read ({error.strerror}); check its permissions") from None

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


def load_image(path: str, root: str | Path) -> Image:
    """One image file as (H, W, 3) uint8 RGB, the same on every machine with the same Pillow.

    Rules: the EXIF or XMP orientation is applied; of animations and multi-page files the first frame counts;
    transparency is laid on white; CMYK, palette, grey and bilevel images become RGB; 16 bit pixels are scaled by their
    full range (that of the TIFF's bit depth), floating point by 1, 255 or 65535, whichever is the smallest that holds
    them. Broken metadata around sound pixels is ignored.

    Args:
        path: the image's name relative to `root`.
        root: the folder that holds all images.

    Raises:
        DataError: absent, empty, truncated or not an image; more than `MAX_PIXELS`; a path that leaves `root`.
    """
    return ImageFolder(root).load(path)


def decode_image(file: IO[bytes], name: str) -> Image:
    """An open image file as (H, W, 3) uint8 RGB by the rules of `load_image`; `name` is what errors call it.

    Raises:
        DataError: empty, truncated or not an image; more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata; the size has its own limit below
            with Pillow.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Pillow.DecompressionBombError(f"{width} x {height} pixels")
                image.load()
                return from_pillow(image)
    except Pillow.DecompressionBombError:
        limit = f"more than {MAX_PIXELS:,} pixels"
        raise DataError(f"Image {name} claims {limit}; shrink it or remove its row") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DataError(f"Image {name} is no readable image ({known}); replace the file or remove its row") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"Image {name} cannot be decoded ({reason}); replace the file or remove its row") from None


def from_pillow(image: Pillow.Image) -> Image:
    """(H, W, 3) uint8 of an opened image: upright as its EXIF says, its first frame, in RGB."""
    return np.ascontiguousarray(_upright(_rgb(image), _orientation(image)))


def _orientation(image: Pillow.Image) -> int:
    """EXIF orientation 1..8; asked after loading, because TIFF images turn themselves then."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable metadata around sound pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Image, orientation: int) -> Image:
    if orientation >= 5:  # 5..8 are 1..4 with rows and columns exchanged first
        pixels = pixels.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _rgb(image: Pillow.Image) -> Image:
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(image)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        drawn = image.convert("RGBA")
        white = Pillow.new("RGBA", drawn.size, "white")
        return np.array(Pillow.alpha_composite(white, drawn).convert("RGB"))
    return np.array(image.convert("RGB"))


def _eight_bits(image: Pillow.Image) -> NDArray[np.uint8]:
    """Grey pixels of 16 or 32 bit, scaled to 0..255; a plain conversion would clip nearly all of them to white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("its pixels are negative or not finite")
    if image.mode == "F":
        top = next((t for t in (1.0, 255.0, 65535.0) if values.max() <= t), 0.0)
    else:
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        top = 2.0**bits - 1 if 8 < bits <= 16 else 65535.0
    if values.max() > top:
        raise ValueError(f"its pixels reach {values.max():g}, beyond 16 bit")
    return np.rint(values * (255.0 / top)).astype(np.uint8)

"""A Pillow image of any mode as uint8 RGB: transparency on white, deep pixels scaled, everything else converted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image

AUTO = "auto"
"""The whole range that a file's kind of pixel has counts from black to white."""

Range = tuple[float, float] | None
"""Which values are black and white where a pixel has more than 8 bits; None is `AUTO`."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_STORED_MAX = "stored_max"
_FULL = 65535.0
_AT_ONCE = 2**20
"""Pixels that are scaled at a time."""

_SPREAD = {"L;2": 85, "L;4": 17}
"""Grey of 2 and 4 bits is spread over 0..255 when it is decoded; the transparent grey that a PNG names is not."""

_LOWER = {
    "RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGBX;16B": "RGBX;16L", "RGBX;16L": "RGBX;16B",
    "RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B", "LA;16B": "RGBA",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
    "RGBA;16N": "RGBA;16B" if sys.byteorder == "little" else "RGBA;16L",
    "RGBX;16N": "RGBX;16B" if sys.byteorder == "little" else "RGBX;16L",
}  # fmt: skip
"""Pillow keeps the upper byte of 16 bit colours; with these decoders of the other byte order it keeps the lower one."""


def value_range(given: Any) -> Range:
    """What a configuration's ``image_range`` says.

    Raises:
        UserError: neither "auto" nor two numbers, the first smaller.
    """
    if given is None or given == AUTO:
        return None
    numbers = given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    plain = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and np.isfinite(n)]
    if len(plain) != 2 or len(numbers) != 2 or not plain[0] < plain[1]:
        shown = str(given)[:60]
        raise UserError(f"data.image_range={shown} is not a range; give [low, high] with low below high, or {AUTO}")
    return float(plain[0]), float(plain[1])


def from_pillow(image: Pillow.Image, values: Range = None) -> Image:
    """(H, W, 3) uint8 of an opened image: upright as its EXIF says, its first frame, in RGB.

    Raises:
        ValueError: the mode has no way to RGB, or its pixels have no meaning as an image.
    """
    note_stored(image)
    image.load()
    return upright(_rgb(image, values), orientation(image))


def note_stored(image: Pillow.Image) -> None:
    """Keep, before loading, what decoding forgets: how a transparent grey and a PGM's numbers are spread.

    The transparent grey of a 2 or 4 bit PNG gets the number that its pixels will have.
    """
    for tile in getattr(image, "tile", ())[:1]:
        grey, spread = image.info.get("transparency"), _SPREAD.get(raw_mode(tile), 1)
        if isinstance(grey, int) and spread > 1:
            image.info["transparency"] = grey * spread
        if tile[0] in ("ppm", "ppm_plain") and image.mode == "I":
            image.info[_STORED_MAX] = tile[3][-1]


def raw_mode(tile: Any) -> str:
    """How a part of the file is decoded, in Pillow's words."""
    args = tile[3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def lower_bytes(image: Pillow.Image, values: Range) -> list[Any] | None:
    """The tiles that decode an opened file's lower bytes, or None where its colours have no 16 bits or these suffice.

    By their full range the upper bytes are the colours; a transparent colour and another range are of 16 bits.
    """
    tiles = list(getattr(image, "tile", ()))
    wanted = values is not None or isinstance(image.info.get("transparency"), tuple)
    if not wanted or not tiles or any(raw_mode(tile) not in _LOWER for tile in tiles):
        return None
    return [_decoded_by(tile, _LOWER[raw_mode(tile)]) for tile in tiles]


def _decoded_by(tile: Any, raw: str) -> Any:
    args = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    return tile._replace(args=args)


def from_halves(upper: Pillow.Image, lower: Pillow.Image, grey: bool, values: Range = None) -> Image:
    """(H, W, 3) uint8 of a 16 bit colour image, loaded once by its upper and once by its lower bytes.

    Args:
        upper: RGB or RGBA.
        lower: the same decoded by `lower_bytes`.
        grey: whether the file has grey and alpha, whose four bytes then are the channels of `lower`.
        values: which values are black and white.
    """
    low = np.asarray(lower)
    if grey:
        low = low[:, :, [1, 1, 1, 3]]
    deep = np.asarray(upper).astype(np.uint16) << 8 | low  # (H, W, 3 or 4)
    colours = np.array(upper)[:, :, :3] if values is None else _scaled(deep[:, :, :3], values)
    clear = upper.info.get("transparency")
    if deep.shape[2] == 4:
        colours = _on_white(np.dstack([colours, np.asarray(upper)[:, :, 3]]))
    elif isinstance(clear, tuple) and len(clear) == 3:
        colours[(deep == np.array(clear, np.uint16)).all(axis=2)] = 255
    return upright(colours, orientation(upper))


def orientation(image: Pillow.Image) -> int:
    """EXIF orientation 1..8; asked after loading, because TIFF images turn themselves then."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable metadata around sound pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(pixels: Image, turned: int) -> Image:
    """The pixels turned as an EXIF orientation says, in one piece of memory."""
    if turned >= 5:  # 5..8 are 1..4 with rows and columns exchanged first
        pixels = pixels.swapaxes(0, 1)
    flip_rows = turned in (3, 4, 7, 8)
    flip_columns = turned in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _rgb(image: Pillow.Image, values: Range) -> Image:
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(image, values)[:, :, None], 3, axis=2)
    if image.mode == "La":  # Pillow has no shorter way from here
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _on_white(drawn: NDArray[np.uint8]) -> Image:
    """(H, W, 4) with alpha -> (H, W, 3) on white."""
    picture = Pillow.fromarray(drawn)
    return np.array(Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def _eight_bits(image: Pillow.Image, values: Range) -> NDArray[np.uint8]:
    """Grey pixels of 16 or 32 bit, scaled to 0..255; a plain conversion would clip nearly all of them to white."""
    stored = np.asarray(image)
    grey: NDArray[Any] = stored
    if values is not None and _STORED_MAX in image.info:  # Pillow has spread a PGM's numbers over 16 bits
        grey = np.rint(grey * (image.info[_STORED_MAX] / _FULL))
    low, high = float(grey.min()), float(grey.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("its pixels are not finite")
    top = _top(image, high)
    if values is None and low < 0:
        raise ValueError("its pixels are negative: say which values are black and white by data.image_range")
    if values is None and high > top:
        raise ValueError(f"its pixels reach {high:g}, beyond 16 bit: data.image_range can say what is white")
    made = _scaled(grey, values or (0.0, top))
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # a TIFF of which 0 is white; Pillow turns 8 bits alone
        made = 255 - made
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        made[stored == clear] = 255
    return made


def _top(image: Pillow.Image, high: float) -> float:
    """The value that is white where none is given."""
    if image.mode == "F":
        return next((t for t in (1.0, 255.0, _FULL) if high <= t), 0.0)
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return float(2.0**bits - 1 if 8 < bits <= 16 else _FULL)


def _scaled(values: NDArray[Any], between: tuple[float, float]) -> NDArray[np.uint8]:
    """The values between black and white as 0..255, some rows at a time: a large image has but one such copy."""
    low, high = between
    made = np.empty(values.shape, np.uint8)
    rows = max(1, _AT_ONCE // values[0].size)
    for at in range(0, len(values), rows):
        part = np.clip(values[at : at + rows].astype(np.float64), low, high)
        made[at : at + rows] = np.rint((part - low) * (255.0 / (high - low)))
    return made

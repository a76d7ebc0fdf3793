"""A part of a resized image, bit for bit as Pillow would have made it, at the cost of that part alone.

Pillow resizes in two passes with weights of 22 bits, each rounded to 8 bits (Pillow's Resample.c); along the rows
first, where both directions grow or both change alike. Where a long, thin image grows and only its centre is kept, or
is first padded to a square, nearly all of that work is thrown away; here it is not done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pil
from PIL.Image import Resampling

from vlmlab.contracts.sample import Image

_BITS = 22
_AT_ONCE = 2**21
"""Values that are summed at a time: 16 MiB of them."""


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near = ((1.5 * x) - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x < 1, 1 - x, 0.0)


FILTERS: dict[int, tuple[float, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    Resampling.BILINEAR: (1.0, _bilinear),
    Resampling.BICUBIC: (2.0, _bicubic),
}
"""Reach in pixels and weight at a distance, of the filters that towers use."""


@dataclass(frozen=True)
class Line:
    """One direction of a resizing of which a part is wanted.

    Attributes:
        before, after: pixels of the whole line before and after.
        first, count: the part of it that is wanted, after the resizing.
        offset: where the image begins in the line; what is outside of it has the colour of the padding.
    """

    before: int
    after: int
    first: int
    count: int
    offset: int = 0


def resample(image: Image, rows: Line, columns: Line, number: int, colour: tuple[int, ...] = (0, 0, 0)) -> Image:
    """(H, W, 3) uint8 -> (rows.count, columns.count, 3) uint8.

    Args:
        image: what is there of the lines.
        rows: the line from top to bottom.
        columns: the line from left to right.
        number: Pillow's of the filter, one of `FILTERS`.
        colour: of the padding.
    """
    out = np.empty((rows.count, columns.count, 3), np.uint8)
    out[:] = colour  # what sees the padding alone stays like this
    down, across = _touched(rows, image.shape[0], number), _touched(columns, image.shape[1], number)
    first, last = _reach(down, down.first, number)[0], _reach(down, down.first + down.count - 1, number)[1]
    first, last = max(first - down.offset, 0), min(last - down.offset, len(image))
    made = _pass(image[first:last], across, number, colour, axis=1)  # (rows that are needed, across.count, 3)
    made = _pass(made, replace(down, offset=down.offset + first), number, colour, axis=0)
    top, left = down.first - rows.first, across.first - columns.first
    out[top : top + down.count, left : left + across.count] = made
    return out


def _touched(line: Line, size: int, number: int) -> Line:
    """The part of what is wanted that sees any of the `size` pixels of the image."""
    seen = [
        at
        for at in range(line.first, line.first + line.count)
        for start, stop in [_reach(line, at, number)]
        if start < line.offset + size and stop > line.offset
    ]
    return replace(line, first=seen[0], count=len(seen)) if seen else replace(line, count=0)


def _pass(image: NDArray[np.uint8], line: Line, number: int, colour: tuple[int, ...], axis: int) -> NDArray[np.uint8]:
    """(H, W, 3) with `line.count` pixels along the axis: each a weighted sum of the image's and the padding."""
    size = image.shape[axis]
    if (line.before, line.after) == (size, line.count):  # all of the line: Pillow's own
        shape = (image.shape[1], line.count) if axis == 0 else (line.count, image.shape[0])
        return np.asarray(Pil.fromarray(np.ascontiguousarray(image)).resize(shape, Resampling(number)))
    weights = np.zeros((line.count, size))
    beside = np.empty((line.count, 1))
    for k in range(line.count):
        start, own = _weights(line, line.first + k, number)
        low = min(max(line.offset - start, 0), len(own))
        high = max(min(line.offset + size - start, len(own)), low)
        weights[k, start + low - line.offset : start + high - line.offset] = own[low:high]
        beside[k] = own[:low].sum() + own[high:].sum()
    padding = beside * np.asarray(colour, np.float64) + 2.0 ** (_BITS - 1)  # (line.count, 3)
    seen = np.flatnonzero(weights.any(axis=0))
    first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    lines = image.swapaxes(0, 1 - axis)[:, first:last]  # (m, n, 3)
    out = np.empty((len(lines), line.count, 3), np.uint8)
    part = max(1, _AT_ONCE // (3 * max(last - first, line.count)))
    for at in range(0, len(lines), part):
        total = np.matmul(weights[:, first:last], lines[at : at + part].astype(np.float64))  # whole numbers, exact
        out[at : at + part] = np.clip(np.floor((total + padding) / 2.0**_BITS), 0, 255)
    return out.swapaxes(0, 1 - axis)


def _reach(line: Line, at: int, number: int) -> tuple[int, int]:
    """The first pixel of the line that output `at` is made of, and the one after the last."""
    scale = line.before / line.after
    reach = FILTERS[number][0] * max(scale, 1.0)
    centre = (at + 0.5) * scale
    return max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), line.before)


def _weights(line: Line, at: int, number: int) -> tuple[int, NDArray[np.float64]]:
    """The first pixel that output `at` is made of, and the weights of it and those after it, in 2^-22."""
    scale = line.before / line.after
    start, stop = _reach(line, at, number)
    places = np.arange(start, stop) - (at + 0.5) * scale + 0.5
    weights = FILTERS[number][1](np.abs(places * (1.0 / max(scale, 1.0))))
    total = float(np.cumsum(weights)[-1])  # one after the other, as Pillow adds
    if total:
        weights = weights / total
    return start, np.trunc(weights * 2.0**_BITS + np.where(weights < 0, -0.5, 0.5))

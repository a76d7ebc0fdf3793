"""An integer rasteriser: the same pixels on every machine, whatever the versions of its libraries.

Shapes are sampled 4 x 4 times per pixel on an integer grid of eighths of a pixel; blending is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

GRID = 4
CELL = 16
SIDE = GRID * CELL
PATCH = 14
"""Side of the square a shape is drawn in: a cell less the jitter of one pixel on every side."""
_SAMPLES = 4
_RADII = (55, 36)
"""Radius of (large, small) in eighths of a pixel."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def _circle(x: Ints, y: Ints, r: int) -> Bools:
    return x * x + y * y <= r * r


def _square(x: Ints, y: Ints, r: int) -> Bools:
    return np.maximum(abs(x), abs(y)) <= r


def _triangle(x: Ints, y: Ints, r: int) -> Bools:
    return (10 * y <= 9 * r) & (19 * abs(x) <= 10 * (y + r))


def _diamond(x: Ints, y: Ints, r: int) -> Bools:
    return abs(x) + abs(y) <= r


def _cross(x: Ints, y: Ints, r: int) -> Bools:
    near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    return (4 * near <= r) & (far <= r)


def _ring(x: Ints, y: Ints, r: int) -> Bools:
    square = x * x + y * y
    return (square <= r * r) & (100 * square >= 30 * r * r)


MASKS: tuple[Callable[[Ints, Ints, int], Bools], ...] = (_circle, _square, _triangle, _diamond, _cross, _ring)


@cache
def coverage(shape: int, size: int) -> NDArray[np.int16]:
    """(PATCH, PATCH) sixteenths of every pixel that a shape covers."""
    steps = np.arange(PATCH * _SAMPLES, dtype=np.int64) * 2 + 1 - PATCH * _SAMPLES
    inside = MASKS[shape](steps[None, :], steps[:, None], _RADII[size])
    return inside.reshape(PATCH, _SAMPLES, PATCH, _SAMPLES).sum((1, 3)).astype(np.int16)


@cache
def bounds(shape: int, size: int) -> tuple[int, int, int, int]:
    """The box ``(x0, y0, x1, y1)`` of a shape within its patch; the upper ends are exclusive."""
    touched = coverage(shape, size) > 0
    xs, ys = np.flatnonzero(touched.any(0)), np.flatnonzero(touched.any(1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1

"""An integer rasteriser: the same pixels on every machine, whatever the versions of its libraries.

Shapes are sampled 4 x 4 times per pixel on an integer grid of eighths of a pixel; blending is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlmlab.contracts.sample import Image
from vlmlab.data.world.stream import noise_bytes
from vlmlab.data.world.words import lexicon

if TYPE_CHECKING:
    from vlmlab.data.world.scene import Scene

GRID = 4
CELL = 16
SIDE = GRID * CELL
PATCH = 14
"""Side of the square a shape is drawn in: a cell less the jitter of one pixel on every side."""
NOISE = 3
"""Largest deviation of a background pixel from the scene's grey level."""
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


def _pattern(name: str) -> Bools:
    """(PATCH, PATCH) bool: the pixels that take the pattern's second tone."""
    y, x = np.mgrid[0:PATCH, 0:PATCH]
    if name == "stripes":
        return np.asarray(y % 3 == 1)
    if name == "dots":
        return np.asarray((x % 3 == 2) & (y % 3 == 2))
    if name == "checks":
        return np.asarray((x // 2 + y // 2) % 2 == 1)
    return np.zeros((PATCH, PATCH), bool)


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


@cache
def _patch(domain: str, color: int, shape: int, size: int, texture: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """What is kept of the background, and what is added, both (PATCH, PATCH, 3) in sixteenths."""
    words = lexicon(domain)
    share = coverage(shape, size)[:, :, None]
    first = np.array(words.palette[color], np.int16)
    mixed_with, tenths = words.second_tone
    second = (first * tenths + mixed_with * (10 - tenths) + 5) // 10
    tone = np.where(_pattern(words.patterns[texture])[:, :, None], second, first)
    return np.repeat(16 - share, 3, 2), (share * tone + 8).astype(np.int16)


def render(scene: Scene) -> Image:
    """The scene's picture, (64, 64, 3) uint8: a grey background with light noise, and its objects."""
    noise = np.frombuffer(noise_bytes(SIDE * SIDE, scene.id, scene.seed, "noise"), np.uint8).reshape(SIDE, SIDE, 1)
    grey = (noise % (2 * NOISE + 1)).astype(np.int16) + (scene.background - NOISE)
    canvas = np.repeat(grey, 3, 2)
    for thing in scene.objects:
        kept, added = _patch(scene.domain, thing.color, thing.shape, thing.size, thing.texture)
        left, top = thing.origin
        area = canvas[top : top + PATCH, left : left + PATCH]
        area[:] = (area * kept + added) >> 4
    return canvas.astype(np.uint8)

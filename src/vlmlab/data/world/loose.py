"""Loose scenes: one to three shapes of any size at any place, which the vision tower learns from besides the grid.

In the world every object is one of two sizes inside its own cell. A tower that has seen nothing else knows a shape
where it fills a patch and nowhere else; loose shapes span several patches, as those of other pictures do. Never
scored, and never seen by the LM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmlab.contracts.sample import Image
from vlmlab.data.world.draw import CELL, GRID, MASKS, SIDE
from vlmlab.data.world.scene import COLORS, HELD_OUT, SHAPES
from vlmlab.data.world.stream import Stream, noise_bytes
from vlmlab.data.world.words import lexicon

NAME = "loose-v1"
RADII = (32, 144)
"""Radius of the smallest and the largest shape, in eighths of a pixel."""
LARGE = 72
"""Radius from which on a shape is called large."""
MOST = 3
_COUNTS = (0.7, 0.2, 0.1)
"""How often a scene has one, two or three shapes."""
_TRIES = 16
"""Shapes that are tried; what meets another or fades into the background is left out."""
_SAMPLES = 4
_UNIT = 8
_TINT, _FADE = 12, 30
"""Largest deviation of a channel from the background's grey, and from a shape's colour."""
_LEAST = 96
"""Smallest sum of the three channels' distances between a shape and what is behind it."""


@dataclass(frozen=True, slots=True)
class Loose:
    """One shape.

    Attributes:
        color, shape, texture: indices into the base lexicon.
        rgb: its colour, near the one that the word names.
        radius: in eighths of a pixel.
        squeeze: (across, down): sixteenths by which coordinates are stretched, so that the shape becomes narrower.
        centre: (x, y) in eighths of a pixel.
        period: pixels of a stripe.
    """

    color: int
    shape: int
    texture: int
    rgb: tuple[int, int, int]
    radius: int
    squeeze: tuple[int, int]
    centre: tuple[int, int]
    period: int

    @property
    def size(self) -> int:
        """0 is large, 1 small."""
        return 0 if self.radius >= LARGE else 1


@dataclass(frozen=True, slots=True)
class LooseScene:
    """What one address holds; ``background`` is RGB, ``noise`` the largest deviation of a background pixel."""

    id: str
    seed: int
    shapes: tuple[Loose, ...]
    background: tuple[int, int, int]
    noise: int


def sample_loose(split: str, index: int, seed: int = 0) -> LooseScene:
    """The scene at an address; the same for the same address, whatever was asked before."""
    name = f"{NAME}/{split}/{index}" if seed == 0 else f"{NAME}.{seed}/{split}/{index}"
    stream = Stream(name, seed, "scene")
    grey = 60 + stream.below(190)
    background = _near(stream, (grey, grey, grey), _TINT)
    wanted = 1 + stream.weighted(_COUNTS)
    shapes: list[Loose] = []
    for _ in range(_TRIES):
        shape = _shape(stream)
        if _seen(shape, background) and not any(_touch(shape, other) for other in shapes):
            shapes.append(shape)
        if len(shapes) == wanted:
            break
    noise = 3 if stream.chance(0.5) else 0
    return LooseScene(name, seed, tuple(shapes), background, noise)


def _shape(stream: Stream) -> Loose:
    colors = lexicon("base").palette
    pairs = [(c, s) for c in range(COLORS) for s in range(SHAPES) if (c, s) not in HELD_OUT]
    color, shape = stream.choice(pairs)
    radius = RADII[0] + stream.below(RADII[1] - RADII[0] + 1)
    stretched = 16 + stream.below(11)
    squeeze = stream.choice(((16, 16), (16, stretched), (stretched, 16)))
    room = SIDE * _UNIT - 2 * radius
    centre = (radius + stream.below(room + 1), radius + stream.below(room + 1))
    texture = 1 if stream.chance(0.2) else 0
    return Loose(
        color, shape, texture, _near(stream, colors[color], _FADE), radius, squeeze, centre, 2 + stream.below(3)
    )


def _near(stream: Stream, rgb: tuple[int, int, int], most: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value - most + stream.below(2 * most + 1))) for value in rgb)
    return red, green, blue


def _seen(shape: Loose, background: tuple[int, int, int]) -> bool:
    return sum(abs(a - b) for a, b in zip(shape.rgb, background, strict=True)) >= _LEAST


def _touch(a: Loose, b: Loose) -> bool:
    """Whether their squares meet."""
    reach = a.radius + b.radius + _UNIT
    return all(abs(p - q) < reach for p, q in zip(a.centre, b.centre, strict=True))


def _window(shape: Loose) -> tuple[slice, slice]:
    """The rows and columns of pixels that a shape can touch."""
    across, down = (
        slice((middle - shape.radius) // _UNIT, -(-(middle + shape.radius) // _UNIT)) for middle in shape.centre
    )
    return down, across


def coverage(shape: Loose) -> NDArray[np.int16]:
    """Sixteenths of every pixel of its window that a shape covers, (rows, columns)."""
    down, across = _window(shape)
    steps = np.arange(SIDE * _SAMPLES, dtype=np.int64) * 2 + 1
    x, y = (
        (steps[side.start * _SAMPLES : side.stop * _SAMPLES] - middle) * by // 16
        for side, middle, by in zip((across, down), shape.centre, shape.squeeze, strict=True)
    )
    inside = MASKS[shape.shape](x[None, :], y[:, None], shape.radius)
    rows, columns = down.stop - down.start, across.stop - across.start
    return inside.reshape(rows, _SAMPLES, columns, _SAMPLES).sum((1, 3)).astype(np.int16)


def render_loose(scene: LooseScene) -> Image:
    """The scene's picture, (64, 64, 3) uint8."""
    noise = np.frombuffer(noise_bytes(SIDE * SIDE, scene.id, scene.seed, "noise"), np.uint8).reshape(SIDE, SIDE, 1)
    grain = (noise % (2 * scene.noise + 1)).astype(np.int16) - scene.noise
    canvas = np.clip(np.array(scene.background, np.int16) + grain, 0, 255)
    rows = np.arange(SIDE)[:, None, None]
    for shape in scene.shapes:
        window, share = _window(shape), coverage(shape)[:, :, None]
        first = np.array(shape.rgb, np.int16)
        striped = (rows[window[0]] // shape.period % 2 == 1) & bool(shape.texture)
        tone = np.where(striped, first // 10, first)
        canvas[window] = (canvas[window] * (16 - share) + tone * share + 8) >> 4
    return canvas.astype(np.uint8)


def covering(scene: LooseScene) -> list[tuple[int, int, int, int] | None]:
    """For each of the 16 cells in raster order the (colour, shape, size, texture) of what covers most of it.

    A cell less than a sixteenth of which is covered is empty; but the cell that a shape covers more than any other cell
    names that shape, however small it is and whatever else is there.
    """
    most = np.full(GRID * GRID, CELL * CELL)  # sixteenths of a pixel: a sixteenth of the cell
    named: list[tuple[int, int, int, int] | None] = [None] * (GRID * GRID)
    for shape in scene.shapes:
        canvas = np.zeros((SIDE, SIDE), np.int16)
        canvas[_window(shape)] = coverage(shape)
        covered = canvas.reshape(GRID, CELL, GRID, CELL).sum((1, 3)).reshape(-1)
        for cell in {int(covered.argmax()), *np.flatnonzero(covered > most).tolist()}:
            named[cell] = (shape.color, shape.shape, shape.size, shape.texture)
            most[cell] = max(most[cell], covered[cell])
    return named

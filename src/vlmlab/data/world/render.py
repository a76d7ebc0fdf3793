"""A scene's picture, blended in integer arithmetic from the shapes of ``draw``."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from vlmlab.contracts.sample import Image
from vlmlab.data.world.draw import PATCH, Bools, coverage
from vlmlab.data.world.scene import Scene
from vlmlab.data.world.stream import noise_bytes
from vlmlab.data.world.words import lexicon

NOISE = 3
"""Largest deviation of a background pixel from the scene's grey level."""


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
    """The scene's picture, (side, side, 3) uint8: a grey background with light noise, and its objects."""
    side = scene.scale.side
    noise = np.frombuffer(noise_bytes(side * side, scene.id, scene.seed, "noise"), np.uint8).reshape(side, side, 1)
    grey = (noise % (2 * NOISE + 1)).astype(np.int16) + (scene.background - NOISE)
    canvas = np.repeat(grey, 3, 2)
    for thing in scene.objects:
        kept, added = _patch(scene.domain, thing.color, thing.shape, thing.size, thing.texture)
        left, top = thing.origin
        area = canvas[top : top + PATCH, left : left + PATCH]
        area[:] = (area * kept + added) >> 4
    return canvas.astype(np.uint8)

"""Thin images have the pixels of the usual way, at the cost of what is seen of them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from tests.tiny import picture

from vlmlab.encoder import preprocess
from vlmlab.encoder.preprocess import Preprocess

SETTINGS = {
    "clip": Preprocess(60, 60, shortest_edge=60),
    "clip with a margin, bilinear": Preprocess(50, 44, shortest_edge=57, resample=2),
    "a crop larger than the image": Preprocess(96, 80, shortest_edge=64),
    "padded to a square": Preprocess(60, 60, shortest_edge=60, square=True, mean=(0.48, 0.45, 0.4)),
    "padded, then squeezed": Preprocess(64, 48, square=True, resample=2),
    "another filter": Preprocess(30, 30, shortest_edge=30, resample=1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_pixels_as_by_the_usual_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS[name]
    for size in [(1, 9), (2, 99), (3, 601), (7, 60), (13, 120), (30, 700), (59, 480), (60, 481), (61, 490), (90, 721)]:
        for shape in (size, size[::-1]):
            image = picture(sum(size), shape)
            found = settings(image)
            with monkeypatch.context() as patch:
                patch.setattr(preprocess, "_THIN", 1e9)
                want = settings(image)
            assert np.array_equal(found, want) and found.flags["C_CONTIGUOUS"], shape


@pytest.mark.parametrize("size", [(2, 20_000), (20_000, 2), (1, 60_000), (60_000, 1), (65_535, 60)], ids=str)
@pytest.mark.parametrize("square", [False, True])
def test_a_thin_image_costs_little(size: tuple[int, int], square: bool) -> None:
    """The usual way takes seconds to minutes and gigabytes for each."""
    settings = replace(Preprocess(224, 224, shortest_edge=224), square=square)
    image = np.full((*size, 3), 77, np.uint8)
    start = time.process_time()
    assert settings(image).shape == (3, 224, 224)
    assert time.process_time() - start < 2


def test_what_is_usual_goes_the_usual_way() -> None:
    wastes = Preprocess(64, 64, shortest_edge=64)._wastes
    assert not wastes(64, 512) and wastes(64, 513) and not wastes(65, 9000)  # where it shrinks nothing is wasted
    assert not Preprocess(64, 64)._wastes(1, 9000)

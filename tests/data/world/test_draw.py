import hashlib
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from vlmlab.data.world.draw import CELL, GRID, SIDE, bounds
from vlmlab.data.world.render import NOISE, render
from vlmlab.data.world.scene import COLORS, SHAPES, Object, Scene, sample_scene

GOLDEN = {
    ("train", 0): "c0afb51292cfed1d",
    ("train", 123456): "f12305932555cd73",
    ("val", 7): "4612d31044060964",
    ("test", 17, 5): "280925bc342151c9",
    ("compositional", 3): "80b62a086a0d860d",
    ("train", 0, 0, "shifted"): "3402fcfe391c9c7b",
    ("test", 42, 2, "shifted"): "d589306161dd278e",
}


@pytest.mark.parametrize("address", GOLDEN)
def test_golden_pixels(address):
    image = render(sample_scene(*address))
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == GOLDEN[address]


@pytest.mark.parametrize("domain", ["base", "shifted"])
def test_boxes_hold_all_drawn_pixels_and_fit_tightly(domain):
    for index in range(150):
        scene = sample_scene("train", index, domain=domain)
        drawn = (render(scene) != render(replace(scene, objects=()))).any(2)
        for thing in scene.objects:
            x0, y0, x1, y1 = thing.box
            inside = drawn[y0:y1, x0:x1]
            assert inside[:, 0].any() and inside[:, -1].any() and inside[0].any() and inside[-1].any()
            assert thing.col * CELL <= x0 < x1 <= (thing.col + 1) * CELL
            assert thing.row * CELL <= y0 < y1 <= (thing.row + 1) * CELL
            drawn[y0:y1, x0:x1] = False
        assert not drawn.any()


def test_background_is_grey_with_light_noise():
    scene = replace(sample_scene("train", 0), objects=())
    image = render(scene).astype(int)
    assert (image == image[:, :, :1]).all()
    assert set(np.unique(image)) == set(range(scene.background - NOISE, scene.background + NOISE + 1))


def _alone(domain: str, color: int, shape: int, size: int, texture: int) -> np.ndarray:
    x0, y0, x1, y1 = bounds(shape, size)
    thing = Object(color, shape, size, texture, 0, 0, (1, 1), (1 + x0, 1 + y0, 1 + x1, 1 + y1))
    return render(Scene(domain, "train", 0, 0, (thing,), 90 if domain == "base" else 210)).astype(int)[:CELL, :CELL]


@pytest.mark.parametrize(("domain", "pixels"), [("base", 12), ("shifted", 4)])
def test_every_value_of_every_attribute_can_be_told_apart(domain, pixels):
    """Two objects that differ in one attribute differ in several pixels by 40 levels or more; noise has 3."""
    looks = {key: _alone(domain, *key) for key in product(range(COLORS), range(SHAPES), range(2), range(2))}
    for a, b in combinations(looks, 2):
        if sum(x != y for x, y in zip(a, b, strict=True)) == 1:
            far = (abs(looks[a] - looks[b]).max(2) >= 40).sum()
            assert far >= pixels, (a, b, far)


def test_small_and_large_never_overlap_in_extent():
    for shape in range(SHAPES):
        large, small = bounds(shape, 0), bounds(shape, 1)
        assert (large[2] - large[0]) >= (small[2] - small[0]) + 4


def test_grid_covers_the_image():
    assert GRID * CELL == SIDE == 64

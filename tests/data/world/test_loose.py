import hashlib
from dataclasses import replace

import numpy as np
import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.captions import placed_names
from vlmlab.data.world.draw import CELL, GRID, SIDE
from vlmlab.data.world.loose import coverage, render_loose, sample_loose
from vlmlab.data.world.scene import HELD_OUT
from vlmlab.data.world.sources import LooseCaptions
from vlmlab.data.world.words import lexicon

WORDS = lexicon("base")
GOLDEN = {
    ("train", 0): "d80bb0de53182f08",
    ("train", 123456): "3ed20cfd286a3385",
    ("val", 7, 3): "a2c81fd834349538",
}


@pytest.mark.parametrize("address", GOLDEN)
def test_golden_pixels(address):
    image = render_loose(sample_loose(*address))
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == GOLDEN[address]


def cells(caption: str) -> list[tuple[str, ...]]:
    words = caption.split()
    assert words[::5] == placed_names()
    return [tuple(words[5 * i + 1 : 5 * i + 5]) for i in range(GRID * GRID)]


def told(shape) -> tuple[str, ...]:
    return (
        WORDS.sizes[shape.size],
        WORDS.colors[shape.color],
        WORDS.textures[shape.texture],
        WORDS.shapes[shape.shape],
    )


def changed(scene, k) -> np.ndarray:
    """(16,): pixels of each cell that shape k changes."""
    without = replace(scene, shapes=scene.shapes[:k] + scene.shapes[k + 1 :])
    pixels = (render_loose(scene) != render_loose(without)).any(2)
    return pixels.reshape(GRID, CELL, GRID, CELL).sum((1, 3)).reshape(-1)


def test_a_cell_is_named_after_what_is_drawn_in_it():
    """Recomputed from the pixels: what changes when a shape is taken away."""
    source, unnamed = LooseCaptions("train", 300), 0
    for index in range(300):
        scene, named = sample_loose("train", index), cells(source[index].turns[0].answer)
        parts = np.stack([changed(scene, k) for k in range(len(scene.shapes))])  # (shapes, 16)
        for cell, words in enumerate(named):
            if words == ("empty",) * 4:
                assert parts[:, cell].max() < 40  # a rim of pixels that are covered in part
                continue
            k = [told(shape) for shape in scene.shapes].index(words)
            assert parts[k, cell] >= parts[:, cell].max() - 24 or parts[k, cell] >= parts[k].max() - 24
            assert parts[k, cell] > 0
        unnamed += len({told(shape) for shape in scene.shapes} - set(named))
    assert unnamed <= 3  # two shapes that have most of themselves in one cell


def test_shapes_are_whole_apart_and_in_their_words_colours():
    for index in range(300):
        scene = sample_loose("val", index)
        assert 1 <= len(scene.shapes) <= 3
        for shape in scene.shapes:
            assert all(shape.radius <= place <= SIDE * 8 - shape.radius for place in shape.centre)
            assert (shape.color, shape.shape) not in HELD_OUT
            nearest = min(
                range(8), key=lambda c: sum(abs(a - b) for a, b in zip(WORDS.palette[c], shape.rgb, strict=True))
            )
            assert nearest == shape.color
        together = np.stack([changed(scene, k) for k in range(len(scene.shapes))]).sum()
        alone = (render_loose(scene) != render_loose(replace(scene, shapes=()))).any(2).sum()
        assert together == alone  # no shape hides another


def test_shapes_come_in_all_sizes():
    radii = [shape.radius for index in range(500) for shape in sample_loose("train", index).shapes]
    assert min(radii) < 40 and max(radii) > 136
    counts = np.histogram(radii, 4, (32, 144))[0] / len(radii)
    assert counts.min() > 0.1  # large ones are left out somewhat more often, as they meet others
    assert max(int(coverage(s).sum()) for i in range(50) for s in sample_loose("train", i).shapes) > 16 * 300


def test_addresses():
    assert (render_loose(sample_loose("train", 5)) == render_loose(sample_loose("train", 5))).all()
    ids = {LooseCaptions(split, 3, seed)[1].id for split in ("train", "val") for seed in (0, 1)}
    assert ids == {"loose-v1/train/1", "loose-v1/val/1", "loose-v1.1/train/1", "loose-v1.1/val/1"}
    with pytest.raises(UserError, match="no split"):
        LooseCaptions("dev", 3)
    with pytest.raises(UserError, match="cannot have 0 samples"):
        LooseCaptions("train", 0)
    with pytest.raises(IndexError):
        LooseCaptions("train", 3)[3]

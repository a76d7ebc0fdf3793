"""The words of every patch of a grid over a scene."""

from __future__ import annotations

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.captions import fused_caption
from vlmlab.data.world.cells import WorldCells
from vlmlab.data.world.scene import sample_scene


def test_on_the_worlds_own_grid_they_are_those_of_the_cells() -> None:
    cells = WorldCells("train", 50)
    for index in range(50):
        want = [f" {word.replace('+', ' ')}" for word in fused_caption(sample_scene("train", index)).split()]
        assert cells.words(index, 4, 4, "compound") == want
        assert cells[index].id == sample_scene("train", index).id and cells[index].turns == ()


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (8, 8), (4, 8), (1, 1)])
def test_on_other_grids_a_patch_names_what_covers_it(rows: int, columns: int) -> None:
    cells = WorldCells("train", 20)
    for index in range(20):
        scene, told = sample_scene("train", index), cells.words(index, rows, columns, "sentence")
        assert len(told) == rows * columns
        for place, words in enumerate(told):
            row, col = divmod(place, columns)
            left, top = col * 64 / columns, row * 64 / rows
            area = (64 / columns) * (64 / rows)
            shares = []
            for thing in scene.objects:
                x0, y0, x1, y1 = thing.box
                wide = min(x1, left + 64 / columns) - max(x0, left)
                high = min(y1, top + 64 / rows) - max(y0, top)
                shares.append(max(0, wide) * max(0, high) / area)
            if abs(max(shares) - 0.25) < 1e-9:
                continue
            if max(shares) < 0.25:
                assert words == " empty"
            else:
                thing = scene.objects[shares.index(max(shares))]
                number = ("one", "two", "three", "four")
                assert words.startswith(f" row {number[thing.row]} column {number[thing.col]} ")


def test_wrong_keys() -> None:
    with pytest.raises(UserError, match="no split 'all'"):
        WorldCells("all", 1)
    with pytest.raises(UserError, match="set size"):
        WorldCells("train", 0)
    with pytest.raises(IndexError):
        WorldCells("train", 2)[2]

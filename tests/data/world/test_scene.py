from collections import Counter

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.render import render
from vlmlab.data.world.scene import HELD_OUT, SPLITS, STANDARD, Scale, sample_scene, scale_of


def _scenes(split: str, count: int = 4000, **address):
    return [sample_scene(split, index, **address) for index in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_one_to_five_objects_uniformly(split):
    found = Counter(len(scene.objects) for scene in _scenes(split))
    assert set(found) == {1, 2, 3, 4, 5}
    assert all(abs(count / 4000 - 0.2) < 0.025 for count in found.values())


def test_at_most_one_object_a_cell_and_all_cells_are_used():
    cells = Counter()
    for scene in _scenes("train"):
        places = [(thing.row, thing.col) for thing in scene.objects]
        assert len(set(places)) == len(places)
        assert places == sorted(places)
        cells.update(places)
    assert len(cells) == 16
    assert max(cells.values()) < 1.2 * min(cells.values())


def test_every_value_occurs_about_as_often():
    for name, values in {"color": 8, "shape": 6, "size": 2, "texture": 2}.items():
        found = Counter(getattr(thing, name) for scene in _scenes("train") for thing in scene.objects)
        assert len(found) == values
        assert max(found.values()) < 1.35 * min(found.values()), name


def test_attributes_repeat_within_scenes():
    scenes = [scene for scene in _scenes("train") if len(scene.objects) >= 3]
    repeated = sum(len({thing.color for thing in scene.objects}) < len(scene.objects) for scene in scenes)
    assert repeated / len(scenes) > 0.6


@pytest.mark.parametrize("domain", ["base", "shifted"])
def test_held_out_pairs_occur_only_in_the_compositional_split(domain):
    assert len(HELD_OUT) >= 6
    for split in ("train", "val", "test"):
        scenes = _scenes(split, 3000, domain=domain)
        assert not any(thing.pair in HELD_OUT for scene in scenes for thing in scene.objects)
    found = Counter()
    for scene in _scenes("compositional", 3000, domain=domain):
        pairs = {thing.pair for thing in scene.objects} & HELD_OUT
        assert pairs
        found.update(pairs)
    assert set(found) == HELD_OUT


def test_splits_seeds_and_domains_give_other_scenes_and_names():
    addresses = [("train", 3), ("val", 3), ("test", 3), ("train", 3, 1), ("train", 3, 0, "shifted"), ("train", 4)]
    scenes = [sample_scene(*address) for address in addresses]
    assert len({scene.id for scene in scenes}) == len(scenes)
    assert len({(scene.objects, scene.background) for scene in scenes}) == len(scenes)
    assert scenes[0].id == "world-v1/train/3"


def test_a_scale_has_its_grid_and_its_objects():
    scale = scale_of(6, [2, 12])
    scenes = _scenes("train", 1000, scale=scale)
    assert set(Counter(len(scene.objects) for scene in scenes)) == set(range(2, 13))
    places = {(thing.row, thing.col) for scene in scenes for thing in scene.objects}
    assert len(places) == 36 and scenes[3].id == "world-v1-6x6-2to12/train/3"
    image = render(scenes[0])
    assert image.shape == (96, 96, 3)
    for thing in scenes[0].objects:
        x0, y0, x1, y1 = thing.box
        assert thing.col * 16 <= x0 < x1 <= (thing.col + 1) * 16 and thing.row * 16 <= y0 < y1 <= (thing.row + 1) * 16
        drawn = abs(image[y0:y1, x0:x1].astype(int) - scenes[0].background).max(-1)
        assert (drawn > 10).mean() > 0.1


def test_the_standard_scale_is_what_it_was():
    assert scale_of(4, (1, 5)) == STANDARD == Scale()
    assert sample_scene("train", 3, scale=STANDARD) == sample_scene("train", 3)


@pytest.mark.parametrize(
    ("grid", "objects"),
    [(1, [1, 1]), (9, [1, 5]), (2, [1, 5]), (4, [3, 2]), (4, [0, 3]), (4, [1]), (4, [1, 1]), (8, [1, 17])],
)
def test_a_scale_that_cannot_be_is_refused(grid, objects):
    with pytest.raises(UserError, match=r"within 2 to 8|<= most"):
        scale_of(grid, objects)


def test_unknown_addresses_are_refused_with_the_choices():
    with pytest.raises(UserError, match="train, val, test, compositional"):
        sample_scene("dev", 0)
    with pytest.raises(UserError, match="base, shifted"):
        sample_scene("train", 0, domain="medical")

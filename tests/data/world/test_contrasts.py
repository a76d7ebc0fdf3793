"""Scenes that differ in one thing, and the samples made of them."""

from __future__ import annotations

import numpy as np
import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.captions import dense_caption, short_captions
from vlmlab.data.world.contrasts import contrasts
from vlmlab.data.world.render import render
from vlmlab.data.world.scene import HELD_OUT, Object, Scene, sample_scene
from vlmlab.data.world.sources import WorldContrasts
from vlmlab.data.world.stream import Stream


def content(thing: Object) -> tuple[int, ...]:
    return thing.row, thing.col, thing.color, thing.shape, thing.size, thing.texture


def drawn(scene: Scene) -> list[np.ndarray]:
    """The pixels of each object's box that are not the background alone."""
    empty = render(Scene(scene.domain, scene.split, scene.index, scene.seed, (), scene.background))
    return [(render(scene) != empty).any(-1)[t.box[1] : t.box[3], t.box[0] : t.box[2]] for t in scene.objects]


def test_no_two_scenes_of_a_group_are_told_alike() -> None:
    for index in range(150):
        scene = sample_scene("train", index)
        group = contrasts(scene, 4, Stream("test", index))
        assert group[0] is scene and len({dense_caption(one) for one in group}) == 4
        assert len({render(one).tobytes() for one in group}) == 4
        for one in group:
            assert not any(thing.pair in HELD_OUT for thing in one.objects)
            cells = [(thing.row, thing.col) for thing in one.objects]
            assert cells == sorted(set(cells)) and all(0 <= n < 4 for cell in cells for n in cell)


def test_one_thing_is_changed() -> None:
    """At most two objects differ: two that exchange something, or one that is altered, moved or gone."""
    for index in range(150):
        scene = sample_scene("train", index)
        for other in contrasts(scene, 4, Stream("test", index))[1:]:
            gone = {content(thing) for thing in scene.objects} - {content(thing) for thing in other.objects}
            come = {content(thing) for thing in other.objects} - {content(thing) for thing in scene.objects}
            assert 1 <= len(gone) <= 2 and len(come) in (0, len(gone))
            fields = [sorted(values) for values in zip(*gone, strict=True)]
            if len(gone) == 2:  # exchanged: every field has the values that it had
                assert fields == [sorted(values) for values in zip(*come, strict=True)]


def test_boxes_are_where_the_pixels_are() -> None:
    for index in range(40):
        for scene in contrasts(sample_scene("train", index), 4, Stream("test", index)):
            for touched in drawn(scene):
                assert touched[0].any() and touched[-1].any() and touched[:, 0].any() and touched[:, -1].any()


def test_a_sample_has_a_caption_for_each_image() -> None:
    source = WorldContrasts("train", 200)
    forms = set()
    for index in range(60):
        sample = source[index]
        forms.add(sample.turns[0].kind)
        assert len(sample.images) == len(sample.turns) == len(set(sample.image_ids)) == 4
        if sample.turns[0].kind == "short":
            scenes = [sample_scene("train", index * 4 + i) for i in range(4)]
            assert all(turn.answer in short_captions(scene) for turn, scene in zip(sample.turns, scenes, strict=True))
        else:
            assert len({turn.answer for turn in sample.turns}) == 4
    assert forms == {"dense", "coordinates", "short"}
    again = WorldContrasts("train", 5)[3]
    assert again.turns == source[3].turns and np.array_equal(again.images, source[3].images)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"scenes": 1}, "2 to 8 scenes, not 1"),
        ({"scenes": 9}, "2 to 8 scenes, not 9"),
        ({"forms": ["cells"]}, "no contrasts of form 'cells'; set forms to some of: dense"),
        ({"forms": []}, "set forms"),
        ({"size": 0}, "set size"),
    ],
)
def test_wrong_keys(keys: dict[str, object], said: str) -> None:
    options = {"split": "train", "size": 1, **keys}
    with pytest.raises(UserError, match=said):
        WorldContrasts(**options)  # type: ignore[arg-type]

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.data.world.binding import Labels, WorldBinding, WorldBindingInstruct
from vlmlab.data.world.scene import HELD_OUT
from vlmlab.data.world.sources import WorldInstruct


def names(prompt: str) -> list[str]:
    return re.findall(r"This is (\w+)\.", prompt)


@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (2, 3), (5, 2)])
def test_names_are_bound_to_what_pictures_share(ways: int, shots: int) -> None:
    """The asked picture has the value of the pictures with the right name, and no picture with another has it."""
    source = WorldBinding("test", 40, ways=ways, shots=shots)
    for index in range(40):
        sample = source._within(index)
        (turn,) = sample.turns
        told = names(turn.prompt)
        assert turn.prompt.count(IMAGE_TAG) == len(sample.scenes) == ways * shots + 1
        assert sorted(Counter(told).values()) == [shots] * ways and turn.chance == 1 / ways
        things = [scene.objects[0] for scene in sample.scenes]
        assert all(
            len(scene.objects) == 1 and thing.pair not in HELD_OUT
            for scene, thing in zip(sample.scenes, things, strict=True)
        )
        values = [getattr(thing, turn.kind) for thing in things]
        assert {name for name, value in zip(told, values, strict=False) if value == values[-1]} == {turn.answer}
        assert len(dict(zip(told, values, strict=False))) == ways == len(set(zip(told, values, strict=False)))


def test_each_sample_has_names_of_its_own_and_each_answer_is_equally_likely() -> None:
    source = WorldBinding("train", 400)
    turns = [source.turns(index)[0] for index in range(400)]
    assert len({turn.answer for turn in turns}) > 380
    first = np.mean([names(turn.prompt)[0] == turn.answer for turn in turns])
    assert 0.42 < first < 0.58
    assert {turn.kind for turn in turns} == {"color", "shape"}
    sample = source[3]
    assert len(set(sample.image_ids)) == len(sample.images) == 3 and sample.image_ids[0].startswith("world-v1/train/")


def accuracy(labels: Labels) -> float:
    """Of a reader that looks: the name of the example with the value of the asked picture."""
    right = []
    source = WorldBinding("test", 400, labels=labels)
    for index in range(400):
        sample = source._within(index)
        (turn,) = sample.turns
        values = [getattr(scene.objects[0], turn.kind) for scene in sample.scenes]
        said = dict(zip(values[:-1], names(turn.prompt), strict=True))[values[-1]]
        right.append(said == turn.answer)
    return float(np.mean(right))


def test_with_shuffled_labels_looking_is_worth_nothing() -> None:
    assert accuracy("right") == 1.0
    assert 0.42 < accuracy("shuffled") < 0.58
    right, shuffled = WorldBinding("test", 9), WorldBinding("test", 9, labels="shuffled")
    assert all(np.array_equal(a, b) for a, b in zip(right[4].images, shuffled[4].images, strict=True))
    assert right.turns(4)[0].answer == shuffled.turns(4)[0].answer


def test_the_other_instructions_are_unchanged() -> None:
    plain, mixed = WorldInstruct("train", 200), WorldBindingInstruct("train", 200, binding_fraction=0.3)
    bound = [index for index in range(200) if mixed.turns(index) != plain.turns(index)]
    assert 0.2 < len(bound) / 200 < 0.4
    first = mixed[bound[0]]
    assert replace(first, images=()) == replace(WorldBinding("train", 200)[bound[0]], images=())


def test_tasks_that_cannot_be_are_refused() -> None:
    for wrong in ({"ways": 1}, {"ways": 7}, {"shots": 0}, {"by": ["size"]}, {"by": []}, {"labels": "none"}):
        with pytest.raises(UserError):
            WorldBinding("test", 1, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="binding_fraction"):
        WorldBindingInstruct("train", 1, binding_fraction=2)

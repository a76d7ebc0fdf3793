import re
from collections import Counter

import pytest

from vlmlab.data.world.captions import REFERENCES, dense_caption, short_captions
from vlmlab.data.world.scene import sample_scene

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"]
SHAPES = {"circle": 0, "square": 1, "triangle": 2, "diamond": 3, "cross": 4, "ring": 5}
PLURALS = {"circles": 0, "squares": 1, "triangles": 2, "diamonds": 3, "crosses": 4, "rings": 5}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
NAME = re.compile(
    r"(an?|the|some|one|two|three|four|five) (?:(large|big|small|little) )?"
    rf"({'|'.join(COLORS)}) (?:(solid|striped) )?({'|'.join([*PLURALS, *SHAPES])})\b"
    r"( on the left| on the right| at the top| at the bottom| in the middle)?"
)
ONE = rf"({'|'.join(COLORS)}) (?:solid |striped )?({'|'.join(SHAPES)})"
RELATED = re.compile(rf"{ONE} (?:is )?(to the left of|to the right of|above|below) (?:an?|the) (?:\w+ )?{ONE}\.")
INSIDE = {
    " on the left": lambda t: t.col == 0,
    " on the right": lambda t: t.col == 3,
    " at the top": lambda t: t.row == 0,
    " at the bottom": lambda t: t.row == 3,
    " in the middle": lambda t: t.row in (1, 2) and t.col in (1, 2),
}


def _check_name(scene, match):
    number, size, color, texture, noun, place = match.groups()
    shape = SHAPES.get(noun, PLURALS.get(noun))
    group = [t for t in scene.objects if t.color == COLORS.index(color) and t.shape == shape]
    count = {"some": len(group), "the": len(group), "a": 1, "an": 1}.get(number) or NUMBERS[number]
    assert len(group) == count
    assert (noun in PLURALS) == (count > 1)
    assert number != "an" or (size is None and color == "orange")
    for thing in group:
        assert size is None or thing.size == (size in ("small", "little"))
        assert texture is None or thing.texture == (texture == "striped")
        assert place is None or INSIDE[place](thing)


def test_short_captions_are_true():
    related = 0
    for index in range(1500):
        scene = sample_scene("train", index)
        for caption in short_captions(scene):
            names = list(NAME.finditer(caption))
            assert names, caption
            for match in names:
                _check_name(scene, match)
            counted = re.match(r"(\w+) objects? with", caption)
            assert not counted or NUMBERS[counted[1]] == len(scene.objects)
            relation = RELATED.search(caption)
            if relation:
                related += 1
                first, second = (
                    next(t for t in scene.objects if t.color == COLORS.index(c) and t.shape == SHAPES[s])
                    for c, s in ((relation[1], relation[2]), (relation[4], relation[5]))
                )
                dx, dy = first.col - second.col, first.row - second.row
                where = {"to the left of": -dx, "to the right of": dx, "above": -dy, "below": dy}[relation[3]]
                assert where == max(abs(dx), abs(dy)) > min(abs(dx), abs(dy))
    assert related > 100


def test_short_captions_are_five_and_uneven():
    lengths, distinct = Counter(), 0
    for index in range(400):
        captions = short_captions(sample_scene("test", index))
        assert len(captions) == REFERENCES
        assert all(caption.endswith(".") and caption == caption.lower() for caption in captions)
        distinct += len(set(captions))
        lengths.update(len(caption.split()) for caption in captions)
    assert distinct / 400 > 4
    assert max(lengths) >= 3 * min(lengths)


def parse_dense(text):
    """The objects a dense caption names, in words."""
    number, listed = re.fullmatch(r"(\w+) objects?: (.*)\.", text).groups()
    found = []
    for part in listed.split(", "):
        match = re.fullmatch(r"an? (\w+) (\w+) (\w+) (\w+) in row (\w+) column (\w+)", part)
        found.append((*match.groups()[:4], NUMBERS[match[5]] - 1, NUMBERS[match[6]] - 1))
    assert len(found) == NUMBERS[number]
    return found


@pytest.mark.parametrize("split", ["train", "compositional"])
def test_dense_captions_list_everything_in_raster_order(split):
    for index in range(300):
        scene = sample_scene(split, index)
        expected = [
            (
                ("large", "small")[t.size],
                COLORS[t.color],
                ("solid", "striped")[t.texture],
                list(SHAPES)[t.shape],
                t.row,
                t.col,
            )
            for t in scene.objects
        ]
        assert parse_dense(dense_caption(scene)) == sorted(expected, key=lambda t: t[4:])

"""Every form of a scene told in words gives back every object: nothing that a question needs is missing."""

import re

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.captions import cells_caption, fused_words
from vlmlab.data.world.scene import sample_scene
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.text import FORMS, caption_turn, describe, text_sample

NUMBERS = {"one": 0, "two": 1, "three": 2, "four": 3}
SIZES = {"large": 0, "big": 0, "small": 1, "little": 1}
COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"]
TEXTURES = ["solid", "striped"]
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]


def _thing(words, row, col):
    """(color, shape, size, texture, row, col) from a phrase in any order of words."""
    known = words.replace(",", " ").split()
    values = []
    for table in (COLORS, SHAPES, SIZES, TEXTURES):
        (word,) = [w for w in known if w in table]
        values.append(table[word] if isinstance(table, dict) else table.index(word))
    return (*values, row, col)


def _at(pattern, text, words, row, col):
    return {_thing(match[words], NUMBERS[match[row]], NUMBERS[match[col]]) for match in re.finditer(pattern, text)}


def _cells(text):
    cells = re.sub(r"row \w+: ", "", text.rstrip(".")).replace(".", ",").split(",")
    assert len(cells) == 16
    return {_thing(cell, *divmod(place, 4)) for place, cell in enumerate(cells) if cell.strip() != "empty"}


def _compound(text):
    cells = text.split()[:16]  # a question may follow
    spaced = [re.sub("|".join([*SIZES, *COLORS, *TEXTURES]), lambda m: m[0] + " ", cell) for cell in cells]
    return {_thing(cell, *divmod(place, 4)) for place, cell in enumerate(spaced) if cell != "empty"}


def _placed(text):
    cells = {a + b: (NUMBERS[a], NUMBERS[b]) for a in list(NUMBERS)[:4] for b in list(NUMBERS)[:4]}
    words = text.split()
    count = next((i for i in range(0, len(words), 2) if words[i] not in cells), len(words))  # a question may follow
    spaced = [re.sub("|".join([*SIZES, *COLORS, *TEXTURES]), lambda m: m[0] + " ", word) for word in words[1:count:2]]
    return {_thing(thing, *cells[cell]) for cell, thing in zip(words[:count:2], spaced, strict=True)}


def _fused(text):
    """Place and content of each cell in one word."""
    pairs = [word.split("+") for word in text.split()[:16]]  # a question may follow
    filled = " ".join(f"{place} {content}" for place, content in pairs if content != "empty")
    assert len(pairs) == 16
    return _placed(filled)


def _told(text):
    found = set()
    for sentence in text.rstrip(".").split("."):
        row, col = re.search(r"row (\w+)", sentence)[1], re.search(r"column (\w+)", sentence)[1]
        found.add(_thing(sentence, NUMBERS[row], NUMBERS[col]))
    return found


PARSERS = {
    "dense": lambda text: _at(r"an? ([\w ]+?) in row (\w+) column (\w+)", text, 1, 2, 3),
    "cells": _cells,
    "compound": _compound,
    "placed": _placed,
    "fused": _fused,
    "coordinates": lambda text: _at(r"row (\w+) column (\w+): ([\w ]+)\.", text, 3, 1, 2),
    "told": _told,
}


@pytest.mark.parametrize("form", PARSERS)
def test_forms_are_complete(form):
    for index in range(300):
        scene = sample_scene("train", index)
        told = PARSERS[form](describe(scene, form, Stream(index)))
        assert told == {(t.color, t.shape, t.size, t.texture, t.row, t.col) for t in scene.objects}


def test_every_form_has_a_test():
    assert set(FORMS) == {*PARSERS, "caption"}


@pytest.mark.parametrize("form", FORMS)
def test_text_samples_hold_no_image(form):
    for index in range(50):
        scene = sample_scene("train", index)
        sample = text_sample(scene, form)
        assert sample.images == () == sample.image_ids
        assert not any("<image>" in turn.prompt for turn in sample.turns)
        if form == "caption":
            assert [turn.prompt for turn in sample.turns] == [""]
        else:
            assert 6 <= len(sample.turns) <= 9
            told = PARSERS[form](re.sub(r"(?<=\.) [A-Z][^.:]*[?.]$", "", sample.turns[0].prompt))
            assert len(told) == len(scene.objects)


def test_fused_words_are_known_beforehand():
    words = set(fused_words())
    assert len(words) == 16 * (1 + 2 * 8 * 2 * 6)
    for index in range(300):
        assert words.issuperset(describe(sample_scene("train", index), "fused", Stream(index)).split())


def test_every_other_conversation_asks_for_the_focus_alone():
    from vlmlab.data.world.sources import WorldText

    source = WorldText("train", 400, forms=["fused"], focus=["relation"], caption_fraction=0.0)
    kinds = [{turn.kind for turn in source[index].turns} for index in range(400)]
    alone = sum(found == {"relation"} for found in kinds) / len(kinds)
    assert 0.2 < alone < 0.4  # half of the scenes in which one object lies beside another
    assert not any("caption" in kind for found in kinds for kind in found)
    assert WorldText("train", 9, forms=["fused"], caption_fraction=1.0)[3].turns[0].prompt.startswith(" oneone+")
    with pytest.raises(UserError, match="no question kind 'places'"):
        WorldText("train", 1, focus=["places"])
    with pytest.raises(UserError, match="caption_fraction is a share"):
        WorldText("train", 1, caption_fraction=2.0)


def test_unknown_forms_are_refused():
    from vlmlab.data.world.sources import WorldText

    with pytest.raises(UserError, match="dense, cells, coordinates, told, compound, placed, fused, caption"):
        WorldText("train", 1, forms=["grid"])


def test_placed_cells_name_every_cell_and_its_place():
    for index in range(50):
        scene = sample_scene("train", index)
        turn = caption_turn(scene, "placed_cells", Stream(index))
        words = turn.answer.split()
        assert len(words) == 16 * 5 and len(set(words[::5])) == 16
        assert words[::5][:5] == ["oneone", "onetwo", "onethree", "onefour", "twoone"]
        assert "".join(f" {word}" for place, word in enumerate(words) if place % 5) == cells_caption(scene)

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Turn
from vlmlab.data.world.captions import attributes, full_phrase
from vlmlab.data.world.questions import dialogue
from vlmlab.data.world.scene import Scene, sample_scene
from vlmlab.data.world.sources import WorldInstruct
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import NUMBERS, SHAPE, phrase
from vlmlab.data.world.written import SYSTEM, WRITTEN, WorldWritten, WorldWrittenInstruct, sentence


def number(word: str) -> int:
    return 0 if word in ("no", "none") else NUMBERS.index(word)


def test_a_sentence_holds_the_answer() -> None:
    """And nothing else of what could have been answered."""
    seen = set()
    for index in range(300):
        scene = sample_scene("train", index)
        for question in dialogue(scene, Stream(index)):
            told = sentence(question)
            seen.add(question.kind)
            answer = question.answer
            if question.kind == "existence":
                assert told.startswith("Yes," if answer == "yes" else "No,")
            elif question.kind == "comparison" and answer == "equal":
                assert "as many" in told
            elif question.kind == "count":
                assert told == f"There {'is' if answer == '1' else 'are'} {NUMBERS[int(answer)]}.".replace(
                    "zero", "none"
                )
            else:
                assert re.search(rf"\b{answer}\b", told)
            assert told.endswith(".") and told.count(".") == 1
    assert len(seen) == 7


def check_left(turn: Turn, scene: Scene) -> None:
    """How many of a shape there are, and that one less is left if it was one of them."""
    asked = turn.prompt.split("how many ")[1].split(" would")[0]
    shapes = [phrase("base", SHAPE, attributes(thing), plural=True) for thing in scene.objects]
    now = number(turn.answer.split()[2])
    assert now == (len(shapes) if asked == "objects" else shapes.count(asked))
    gone = "is one of them" in turn.answer or "one object" in turn.prompt
    assert number(turn.answer.split("So ")[1].split()[0]) == now - gone


def check_way(turn: Turn, scene: Scene) -> None:
    """The steps lead from the one cell to the other, and both hold something."""
    cells = re.findall(r"row (\w+) column (\w+)\.", turn.answer)
    start, end = ([number(word) - 1 for word in cell] for cell in cells)
    for many, way in re.findall(r"(\w+) (?:row|column)s? (up|down|left|right)", turn.answer):
        start[0] += {"up": -1, "down": 1}.get(way, 0) * number(many)
        start[1] += {"left": -1, "right": 1}.get(way, 0) * number(many)
    assert start == end and tuple(end) in {(thing.row, thing.col) for thing in scene.objects}


def check_halves(turn: Turn, scene: Scene) -> None:
    """How many are in each half, and which has more."""
    left = "left" in turn.prompt
    first = sum((thing.col if left else thing.row) < scene.scale.grid / 2 for thing in scene.objects)
    told = [number(word) for word in re.findall(r"There (?:is|are) (\w+)", turn.answer)]
    assert told == [first, len(scene.objects) - first]
    name = (("left", "right") if left else ("upper", "lower"))[told[0] < told[1]]
    assert ("as many" if told[0] == told[1] else f"the {name} half has more") in turn.answer


@pytest.mark.parametrize("grid", [3, 4])
def test_reasoning_follows_from_the_scene(grid: int) -> None:
    source = WorldWritten("train", 300, types=["reasoning"], grid=grid)
    forms = set()
    for index in range(300):
        sample = source._within(index)
        assert sample.turns and sample.system == SYSTEM
        for turn in sample.turns:
            form = {"If": check_left, "How": check_way}.get(turn.prompt.split()[0], check_halves)
            form(turn, sample.scenes[0])
            forms.add(form)
    assert forms == {check_left, check_way, *([] if grid % 2 else [check_halves])}


def test_a_description_names_everything_where_it_is() -> None:
    source = WorldWritten("train", 40, types=["detail"])
    for index in range(40):
        sample = source._within(index)
        (scene,) = sample.scenes
        told = re.findall(r"In row (\w+) column (\w+) there is an? ([a-z ]+)", sample.turns[0].answer)
        assert [(number(r) - 1, number(c) - 1, words) for r, c, words in told] == [
            (thing.row, thing.col, full_phrase(scene, thing)) for thing in scene.objects
        ]
        assert number(sample.turns[0].answer.split()[3]) == len(scene.objects)


def test_types_come_in_the_shares_of_the_paper_and_in_turn_in_a_benchmark() -> None:
    source = WorldWritten("train", 1000)
    kinds = [source.turns(index)[0].kind for index in range(1000)]
    assert [kinds.count(name) / 1000 for name in WRITTEN] == pytest.approx([58 / 158, 23 / 158, 77 / 158], abs=0.04)
    asked = WorldWritten("test", 9, multi_turn=False)
    assert [asked.turns(index)[0].kind for index in range(3)] == list(WRITTEN)
    assert all(len(asked.turns(index)) == 1 for index in range(9))
    assert {WorldWritten("train", 9, shares=[0, 1, 0]).turns(i)[0].kind for i in range(9)} == {"detail"}
    assert asked[0].system == SYSTEM and asked[0].image_ids


def test_the_other_instructions_are_unchanged() -> None:
    plain, mixed = WorldInstruct("train", 100), WorldWrittenInstruct("train", 100, written_fraction=0.5)
    same = [i for i in range(100) if mixed.turns(i) == plain.turns(i)]
    assert 35 < len(same) < 65
    assert all((mixed[i].system == "") == (i in same) for i in range(0, 100, 7))
    assert replace(mixed[same[0]], images=()) == replace(plain[same[0]], images=())


def test_types_and_shares_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="no type 'poem'"):
        WorldWritten("train", 1, types=["poem"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="do not fit"):
        WorldWritten("train", 1, shares=[1])
    with pytest.raises(UserError, match="written_fraction"):
        WorldWrittenInstruct("train", 1, written_fraction=-1)

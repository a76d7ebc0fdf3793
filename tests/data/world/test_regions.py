from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.boxes import BOXES, Boxes, box_text, overlap, to_pixels
from vlmlab.data.world import base
from vlmlab.data.world.draw import CELL
from vlmlab.data.world.regions import IDENTIFIERS, TASKS, WorldRegionInstruct, WorldRegions
from vlmlab.data.world.sources import WorldInstruct


def test_the_box_of_an_answer_is_where_the_picture_shows_something() -> None:
    """Its pixels differ from the grey around them, and the four edges of the box touch the object."""
    text = box_text("paligemma")  # 1024 steps of 64 pixels: exact
    for sample in list(WorldRegions("test", 40, tasks=["refer"], boxes="paligemma")):
        (turn,) = sample.turns
        box = text.read(turn.answer)
        assert box is not None and turn.prompt.startswith("Where is the ") and turn.chance == 1 / 16
        x0, y0, x1, y1 = (round(value) for value in to_pixels(box, (64, 64)))
        image = sample.images[0].astype(int)
        drawn = np.abs(image - np.median(image, axis=(0, 1))).max(-1) > 12  # beyond the noise
        inside = drawn[y0:y1, x0:x1]
        assert inside.any(0)[[0, -1]].sum() + inside.any(1)[[0, -1]].sum() >= 2 and inside.mean() > 0.2
        assert x1 - x0 <= CELL and y1 - y0 <= CELL


def test_what_is_in_a_box_is_what_was_asked_to_be_found() -> None:
    """A scene's objects by both ways: the words of a box are the words that the picture's list puts before it."""
    text = box_text("qwen_vl")
    for index in range(60):
        turns = WorldRegions("train", 60, tasks=["identify", "ground"], multi_turn=True).turns(index)
        (listed,) = (turn.answer for turn in turns if turn.kind == "ground")
        named = dict(part.removeprefix("<ref>").split("</ref>")[::-1] for part in listed.split(", "))
        for turn in turns:
            if turn.kind == "identify":
                assert named[turn.prompt.removeprefix("What is in ").removesuffix("?")] == turn.answer
        assert len(named) == len(listed.split(", ")) and all(text.read(box) for box in named)


def test_no_box_is_right_for_two_cells() -> None:
    """So a constant answer is right once in sixteen: what ``chance`` says."""
    text = box_text("qwen_vl")
    boxes = [text.read(WorldRegions("test", 200, tasks=["refer"]).turns(index)[0].answer) for index in range(200)]
    known = [box for box in boxes if box is not None]
    assert len(known) == 200
    best = max(sum(overlap(a, b) >= 0.5 for b in known) for a in known)
    assert best / 200 < 0.13  # the fullest of 16 cells, drawn 200 times


@pytest.mark.parametrize("boxes", BOXES)
def test_every_convention_and_task(boxes: Boxes) -> None:
    source = WorldRegions("val", 20, boxes=boxes, tasks=TASKS, identifiers=True, grid=6, objects=[2, 8])
    assert [source.turns(i)[0].kind for i in range(5)] == list(TASKS)
    for index in range(5):
        (turn,) = source.turns(index)
        boxed = box_text(boxes).read(turn.answer) is not None
        assert boxed == (turn.kind in ("refer", "ground")) and turn.prompt.startswith(IDENTIFIERS[TASKS[index]])


def test_only_the_identifier_tells_some_tasks_apart() -> None:
    both = [WorldRegions("val", 30, tasks=[task], identifiers=True) for task in ("refer", "place")]
    words = [{source.turns(i)[0].prompt.partition(" ")[2] for i in range(30)} for source in both]
    assert words[0] == words[1]
    described = [WorldRegions("val", 5, tasks=[task], identifiers=True).turns(0)[0] for task in ("ground", "caption")]
    assert [turn.prompt for turn in described] == [
        "[grounding] Describe the picture.",
        "[caption] Describe the picture.",
    ]
    assert len(described[1].references) == 5
    with pytest.raises(UserError, match="'place' without identifiers=true"):
        WorldRegions("val", 5, tasks=["place"])
    with pytest.raises(UserError, match="no task 'find'"):
        WorldRegions("val", 5, tasks=["find"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="no task at all"):
        WorldRegions("val", 5, tasks=[])


def test_the_other_instructions_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, mixed = WorldInstruct("train", 200), WorldRegionInstruct("train", 200, region_fraction=0.5)
    told = WorldRegionInstruct("train", 200, region_fraction=0.5, identifiers=True)
    monkeypatch.setattr(base, "render", lambda scene: pytest.fail("an image was drawn"))
    regions = [i for i in range(200) if mixed.turns(i) != plain.turns(i)]
    assert 0.4 < len(regions) / 200 < 0.6
    for index in set(range(200)) - set(regions):
        turns = [replace(turn, prompt=turn.prompt.partition(" ")[2]) for turn in told.turns(index)]
        assert tuple(turns) == plain.turns(index)
    assert {turn.kind for i in regions for turn in mixed.turns(i)} == {"refer", "identify", "ground"}
    with pytest.raises(UserError, match="region_fraction"):
        WorldRegionInstruct("train", 5, region_fraction=2)

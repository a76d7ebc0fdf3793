"""Text-only samples: scenes told in words, so that a language model knows relations and counting before it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.world.captions import (
    attributes,
    cell_words,
    cells_caption,
    compound_caption,
    dense_caption,
    full_phrase,
    fused_caption,
    placed_caption,
    placed_cells_caption,
    short_captions,
)
from vlmlab.data.world.draw import GRID
from vlmlab.data.world.questions import dialogue
from vlmlab.data.world.scene import Object, Scene
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import COLOR, NUMBERS, SHAPE, SIZE, TEXTURE, lexicon, phrase, with_article

CELLS_PROMPT = "Name every cell in four words."
PLACED_CELLS_PROMPT = "Name every cell: its place, then four words."
CAPTION_REQUEST = 0.5
"""How often a conversation about a scene told in words also asks for a caption."""


def _dense(scene: Scene, stream: Stream) -> str:
    return dense_caption(scene)


def _cells(scene: Scene, stream: Stream) -> str:
    """The 16 cells in raster order, with or without the names of the rows."""
    inside = {(thing.row, thing.col): full_phrase(scene, thing) for thing in scene.objects}
    rows = [", ".join(inside.get((row, col), "empty") for col in range(GRID)) for row in range(GRID)]
    if stream.chance(0.5):
        return f"{', '.join(rows)}."
    return " ".join(f"row {NUMBERS[row + 1]}: {cells}." for row, cells in enumerate(rows))


def _compound(scene: Scene, stream: Stream) -> str:
    """One word a cell: as short as the picture's own tokens."""
    return compound_caption(scene)


def _placed(scene: Scene, stream: Stream) -> str:
    """Two words an object: where it is, and what it is."""
    return placed_caption(scene)


def _fused(scene: Scene, stream: Stream) -> str:
    """One word a cell that takes one position, its place and its content: what a picture's token holds."""
    return fused_caption(scene)


def _coordinates(scene: Scene, stream: Stream) -> str:
    """Cell and object, in random order."""
    things = stream.shuffled(scene.objects)
    return " ".join(f"{cell_words(thing)}: {full_phrase(scene, thing)}." for thing in things)


def _describe_object(scene: Scene, thing: Object, stream: Stream) -> str:
    words = lexicon(scene.domain)
    size = stream.choice((words.sizes, words.synonyms))[thing.size]
    named = f"{size} {phrase(scene.domain, COLOR | SHAPE | TEXTURE, attributes(thing))}"
    plain = phrase(scene.domain, COLOR | SHAPE | SIZE, attributes(thing))
    row, column = NUMBERS[thing.row + 1], NUMBERS[thing.col + 1]
    texture = words.textures[thing.texture]
    return stream.choice(
        (
            f"there is {with_article(named)} in row {row} and column {column}.",
            f"in column {column} and row {row} is {with_article(plain)}, {texture}.",
            f"{with_article(plain)} is in row {row} and column {column}, it is {texture}.",
        )
    )


def _described(scene: Scene, stream: Stream) -> str:
    """Sentences as people would say them, in random order, with synonyms, nothing left out."""
    return " ".join(_describe_object(scene, thing, stream) for thing in stream.shuffled(scene.objects))


_FORMS: dict[str, Callable[[Scene, Stream], str]] = {
    "dense": _dense,
    "cells": _cells,
    "coordinates": _coordinates,
    "told": _described,
    "compound": _compound,
    "placed": _placed,
    "fused": _fused,
}
Form = Literal["dense", "cells", "coordinates", "told", "compound", "placed", "fused", "caption"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Forms of a text-only sample; ``caption`` is caption text alone, without a question."""
USUAL_FORMS = ("dense", "cells", "coordinates", "told", "caption")
"""What a source without a choice of forms mixes; never to be extended, since that would change its samples."""


def check_forms(forms: Sequence[str] | None) -> tuple[str, ...]:
    """The forms asked for, the usual ones for None.

    Raises:
        UserError: for an empty list or an unknown form.
    """
    chosen = USUAL_FORMS if forms is None else tuple(forms)
    unknown = [form for form in chosen if form not in FORMS]
    if unknown or not chosen:
        wrong = f"no text form {unknown[0]!r}" if unknown else "nothing to tell with an empty list of forms"
        raise UserError(f"The world has {wrong}; set forms to some of: {', '.join(FORMS)}.")
    return chosen


def describe(scene: Scene, form: str, stream: Stream) -> str:
    """The scene in words, complete: every object with its attributes and its cell."""
    return _FORMS[form](scene, stream)


def caption_turn(scene: Scene, style: str, stream: Stream) -> Turn:
    """A request for a caption: one of five references for ``short``, the re-caption for ``dense``, or the cells."""
    words = lexicon(scene.domain)
    if style == "cells":
        return Turn(CELLS_PROMPT, cells_caption(scene), "cells_caption")
    if style == "placed_cells":
        return Turn(PLACED_CELLS_PROMPT, placed_cells_caption(scene), "cells_caption")
    if style == "dense":
        return Turn(stream.choice(words.dense_prompts), dense_caption(scene), "dense_caption")
    captions = short_captions(scene)
    return Turn(stream.choice(words.short_prompts), stream.choice(captions), "caption", references=captions)


def _conversation(scene: Scene, form: str, stream: Stream, focus: Sequence[str], captions: float) -> tuple[Turn, ...]:
    asked = dialogue(scene, stream, focus) if focus and stream.chance(0.5) else []
    turns = [question.turn() for question in asked or dialogue(scene, stream)]
    if stream.chance(captions):
        style = "short" if form == "dense" else stream.choice(("short", "dense"))
        turns.insert(stream.below(len(turns) + 1), caption_turn(scene, style, stream))
    first = turns[0]
    told = f"{describe(scene, form, stream)} {first.prompt}"
    turns[0] = replace(first, prompt=told)
    return tuple(turns)


def text_sample(
    scene: Scene, form: str, focus: Sequence[str] = (), caption_fraction: float = CAPTION_REQUEST
) -> Sample:
    """A text-only sample about a scene in one of ``FORMS``; every other conversation asks for the focus alone."""
    stream = Stream(scene.id, scene.seed, "text", form)
    if form == "caption":
        turn = caption_turn(scene, stream.choice(("short", "dense")), stream)
        turns: tuple[Turn, ...] = (Turn("", turn.answer, turn.kind, turn.references),)
    else:
        turns = _conversation(scene, form, stream, focus, caption_fraction)
    return Sample(f"{scene.id}/{form}", (), turns)

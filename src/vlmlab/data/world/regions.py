"""Regions of the embedded world: where something is, as a box, and what is in a box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Unpack, get_args

from annotated_types import MinLen

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Turn
from vlmlab.contracts.values import Count, Share
from vlmlab.data.boxes import Boxes, BoxText, box_text, of_pixels
from vlmlab.data.world.base import STRIDE, ScaledSceneKeys, ScaledSource, Unrendered, check_share
from vlmlab.data.world.captions import cell_words, full_phrase, short_captions
from vlmlab.data.world.questions import View
from vlmlab.data.world.scene import Split
from vlmlab.data.world.sources import InstructKeys, WorldInstruct, with_task_words
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import with_article

Task = Literal["refer", "identify", "ground", "place", "caption"]
TASKS: tuple[Task, ...] = get_args(Task)
PLAIN: tuple[Task, ...] = ("refer", "identify", "ground")
"""Tasks that their words tell apart; the other two are told from them by an identifier alone."""
Tasks = Annotated[Sequence[Task], MinLen(1)]

IDENTIFIERS: dict[Task, str] = {
    "refer": "[refer]",
    "identify": "[identify]",
    "ground": "[grounding]",
    "place": "[vqa]",
    "caption": "[caption]",
}
"""MiniGPT-v2's (arXiv 2310.09478)."""

WHERE = "Where is {ref}?"
WHAT = "What is in {box}?"
DESCRIBE = "Describe the {picture}."
"""Ours, and the same whatever the identifier."""


def _box(view: View, index: int, text: BoxText) -> str:
    """The box of an object in words."""
    side = view.scene.scale.side
    return text.write(of_pixels(view.scene.objects[index].box, (side, side)))


def _reference(view: View, index: int, stream: Stream) -> str:
    return view.reference(index, stream.choice(view.masks(index)))


def _refer(view: View, index: int, stream: Stream, text: BoxText) -> Turn:
    """Chance: an object is as likely in any cell, and no box overlaps what is in two of them by half."""
    told = WHERE.format(ref=_reference(view, index, stream))
    return Turn(told, _box(view, index, text), "refer", chance=1 / view.scene.scale.grid**2)


def _place(view: View, index: int, stream: Stream, text: BoxText) -> Turn:
    told = WHERE.format(ref=_reference(view, index, stream))
    return Turn(told, cell_words(view.scene.objects[index]), "place", chance=1 / view.scene.scale.grid**2)


def _identify(view: View, index: int, stream: Stream, text: BoxText) -> Turn:
    answer = with_article(full_phrase(view.scene, view.scene.objects[index]))
    return Turn(WHAT.format(box=_box(view, index, text)), answer, "identify")


def _ground(view: View, index: int, stream: Stream, text: BoxText) -> Turn:
    """Every object with its box, in raster order; about the whole scene, whatever the object."""
    told = (
        f"{text.named(with_article(full_phrase(view.scene, thing)))}{_box(view, i, text)}"
        for i, thing in enumerate(view.scene.objects)
    )
    return Turn(DESCRIBE.format(picture=view.words.picture), ", ".join(told), "ground")


def _caption(view: View, index: int, stream: Stream, text: BoxText) -> Turn:
    captions = short_captions(view.scene)
    asked = DESCRIBE.format(picture=view.words.picture)
    return Turn(asked, stream.choice(captions), "caption", references=captions)


_WRITERS: dict[Task, Callable[[View, int, Stream, BoxText], Turn]] = {
    "refer": _refer,
    "identify": _identify,
    "ground": _ground,
    "place": _place,
    "caption": _caption,
}
_OF_SCENE = ("ground", "caption")
"""Tasks that ask about the whole scene, at most once a conversation."""


class WorldRegions(ScaledSource):
    """Where an object is, as a box; what is in a box; and all objects with their boxes.

    Args:
        split, size, seed, domain: as for every source of the world.
        tasks: ``refer`` (words to a box), ``identify`` (a box to words), ``ground`` (the picture in phrases with
            boxes), and with identifiers ``place`` (the words of ``refer``, answered by row and column) and ``caption``
            (those of ``ground``, answered by a short caption); null: the first three.
        boxes: the convention in which boxes are written.
        bins: its steps of a side; null: as its paper has.
        multi_turn: a conversation about a scene, one turn an object and one about all; False for benchmarks: a question
            a sample, tasks in turn.
        identifiers: a word for the task before every prompt, as MiniGPT-v2 has ([refer], [identify], [grounding],
            [vqa], [caption]).
        grid, objects: the scenes' scale.

    Raises:
        UserError: as for every source of the world, an unknown task or convention, or tasks that only an identifier
            would tell apart.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        tasks: Tasks | None = None,
        boxes: Boxes = "qwen_vl",
        bins: Count | None = None,
        multi_turn: bool = False,
        identifiers: bool = False,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(split, size, **scenes)
        self.tasks = check_tasks(tasks, identifiers)
        self.boxes, self.bins = boxes, bins
        self.multi_turn, self.identifiers = multi_turn, identifiers
        self._text = box_text(boxes, bins)

    def _unrendered(self, index: int) -> Unrendered:
        stream = self._stream(index, "regions")
        for attempt in range(STRIDE):
            view = View(self._scene(index * STRIDE + attempt))
            named = [i for i in range(len(view.attributes)) if view.masks(i)]
            named = [i for i in named if i in view.focus] or named
            if named:
                turns = (
                    self._conversation(view, named, stream)
                    if self.multi_turn
                    else (self._one(index, view, stream, named),)
                )
                return Unrendered(f"{view.scene.id}/regions/{index}", (view.scene,), turns)
        raise UserError(
            f"No scene with grid={self.grid} and objects={[*self.objects]} has an object that words single out; give "
            "another range of objects."
        )

    def _one(self, index: int, view: View, stream: Stream, named: Sequence[int]) -> Turn:
        return self._turn(self.tasks[index % len(self.tasks)], view, stream.choice(named), stream)

    def _conversation(self, view: View, named: Sequence[int], stream: Stream) -> tuple[Turn, ...]:
        """A turn for every object that can be named, in random order, and one about all of them."""
        singly = [task for task in self.tasks if task not in _OF_SCENE]
        whole = [task for task in self.tasks if task in _OF_SCENE]
        turns = [self._turn(stream.choice(singly), view, i, stream) for i in stream.shuffled(named) if singly]
        if whole:
            told = self._turn(stream.choice(whole), view, named[0], stream)
            turns.insert(stream.below(len(turns) + 1), told)
        return tuple(turns)

    def _turn(self, task: Task, view: View, index: int, stream: Stream) -> Turn:
        turn = _WRITERS[task](view, index, stream, self._text)
        return replace(turn, prompt=f"{IDENTIFIERS[task]} {turn.prompt}") if self.identifiers else turn


class WorldRegionInstruct(WorldInstruct):
    """Instruction tuning in which some samples are about boxes, see `WorldRegions`; the others are unchanged.

    Args:
        split, size, seed, domain: as for every source of the world.
        caption_fraction: share of caption samples among the others, half of them short, in 0..1.
        kinds: kinds of question asked there; all of them for None.
        region_fraction: share of samples about boxes, in 0..1.
        tasks, boxes, bins, identifiers: as for `WorldRegions`; with identifiers the other samples have theirs, too,
            [vqa] or [caption].
        grid, objects: the scenes' scale.

    Raises:
        UserError: as for ``WorldInstruct`` and `WorldRegions`.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        region_fraction: Share = 0.5,
        tasks: Tasks | None = None,
        boxes: Boxes = "qwen_vl",
        bins: Count | None = None,
        identifiers: bool = False,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        check_share("region_fraction", region_fraction)
        self.region_fraction, self.identifiers = region_fraction, identifiers
        self.boxes, self.bins = boxes, bins
        self._regions = WorldRegions(split, size, tasks, boxes, bins, True, identifiers, **self.drawn)
        self.tasks = self._regions.tasks

    def _unrendered(self, index: int) -> Unrendered:
        if self._stream(index, "instruct/regions").chance(self.region_fraction):
            return self._regions._unrendered(index)
        sample = super()._unrendered(index)
        return with_task_words(sample) if self.identifiers else sample


def check_tasks(tasks: Sequence[str] | None, identifiers: bool) -> tuple[Task, ...]:
    """The tasks asked for; those that their words tell apart for None.

    Raises:
        UserError: an unknown task, none, or one that is not told apart without identifiers.
    """
    chosen = PLAIN if tasks is None else tuple(tasks)
    known: tuple[str, ...] = TASKS if identifiers else PLAIN
    unknown = [task for task in chosen if task not in known]
    if unknown or not chosen:
        wrong = f"no task {unknown[0]!r}" if unknown else "no task at all"
        hint = "" if identifiers or not set(unknown) & set(TASKS) else " without identifiers=true"
        raise UserError(f"The world's regions have {wrong}{hint}; set tasks to some of: {', '.join(known)}.")
    return tuple(task for task in TASKS if task in chosen)

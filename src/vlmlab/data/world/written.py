"""Instructions of three types written from scenes, as LLaVA's were from captions and boxes (arXiv 2304.08485).

There a language model wrote them; here rules do, so that every sentence is true of its scene: a conversation in whole
sentences, a detailed description, and questions whose answer says what it follows from before it concludes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Unpack, get_args

from annotated_types import MinLen

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Turn
from vlmlab.contracts.values import Count, NotNegative, Share
from vlmlab.data.world.base import ScaledSceneKeys, ScaledSource, Unrendered, check_share
from vlmlab.data.world.captions import cell_words, full_phrase, joined
from vlmlab.data.world.fitting import weights_of
from vlmlab.data.world.questions import Question, View, dialogue
from vlmlab.data.world.scene import Object, Scene, Split
from vlmlab.data.world.sources import InstructKeys, WorldInstruct
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import DIRECTIONS, NUMBERS, SHAPE, phrase, with_article

Written = Literal["conversation", "detail", "reasoning"]
WRITTEN: tuple[Written, ...] = get_args(Written)
SHARES = (58.0, 23.0, 77.0)
"""Thousands of samples of each type in LLaVA-Instruct-158k."""
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
"""LLaVA's system line: by it whole sentences are asked for, since the world's other questions have the same words."""

_HALVES = (
    ("Are there more {nouns} in the left or in the right half of the {picture}, and why?", ("left", "right"), "col"),
    ("Does the upper or the lower half of the {picture} hold more {nouns}, and why?", ("upper", "lower"), "row"),
)
_LEFT = "If {ref} were taken away, how many {terms} would be left?"
_WAY = "How does one get from {ref} to {other}?"
_DETAIL = "Can you tell me everything that the {picture} shows?"
Pair = tuple[str, str]


def sentence(question: Question) -> str:
    """The answer to a question of the world as a whole sentence."""
    answer = question.answer
    if question.kind == "existence":
        return "Yes, there is." if answer == "yes" else "No, there is not."
    if question.kind == "count":
        number = NUMBERS[int(answer)]
        return {"zero": "There are none.", "one": "There is one."}.get(number, f"There are {number}.")
    if question.kind == "position":
        return f"It is in {question.template} {answer}."
    if question.kind == "relation":
        return f"It is {answer} it." if answer in DIRECTIONS[2:] else f"It is to the {answer} of it."
    if question.kind == "comparison":
        if answer == "equal":
            return "There are as many of the one as of the other."
        return f"There are more {answer}{'' if question.template == 'shape' else ' ones'}."
    return f"It is {with_article(answer) if question.template == 'shape' else answer}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(count: int, noun: str, nouns: str) -> str:
    """``There are two objects``."""
    return f"There {'is' if count == 1 else 'are'} {NUMBERS[count] if count else 'no'} {noun if count == 1 else nouns}"


def _conversation(scene: Scene, stream: Stream) -> list[Pair]:
    asked = dialogue(scene, stream, weights=weights_of(scene.scale))
    return [(question.prompt, sentence(question)) for question in asked]


def detail(scene: Scene) -> str:
    """Everything in a scene, a sentence an object in raster order, and its relation to the one before it."""
    words, count = View(scene).words, len(scene.objects)
    told = [f"The {words.picture} shows {NUMBERS[count]} {words.noun if count == 1 else words.nouns}."]
    for before, thing in zip((None, *scene.objects), scene.objects, strict=False):
        beside = "" if before is None else _beside(before, thing, words.noun)
        told.append(f"In {cell_words(thing)} there is {with_article(full_phrase(scene, thing))}{beside}.")
    return " ".join(told)


def _beside(before: Object, thing: Object, noun: str) -> str:
    shared = "row" if before.row == thing.row else "column" if before.col == thing.col else ""
    return f", in the same {shared} as the {noun} before" if shared else ""


def _detailed(scene: Scene, stream: Stream) -> list[Pair]:
    return [(_DETAIL.format(picture=View(scene).words.picture), detail(scene))]


def _halves(view: View, stream: Stream) -> Pair | None:
    """How many are on each side, which they are, and on which side there are more; a grid of odd rows has no halves."""
    if view.scene.scale.grid % 2:
        return None
    prompt, sides, along = stream.choice(_HALVES)
    middle, words = view.scene.scale.grid / 2, view.words
    groups = [
        [thing for thing in view.scene.objects if (getattr(thing, along) + 0.5 > middle) == bool(side)]
        for side in (0, 1)
    ]
    told = []
    for side, group in zip(sides, groups, strict=True):
        named = joined([with_article(full_phrase(view.scene, thing)) for thing in group]) if group else ""
        told.append(f"{_number(len(group), words.noun, words.nouns)} in the {side} half{': ' if named else ''}{named}.")
    first, second = (len(group) for group in groups)
    best = "So both have as many." if first == second else f"So the {sides[first < second]} half has more."
    return prompt.format(nouns=words.nouns, picture=words.picture), " ".join([*told, best])


def _left(view: View, stream: Stream) -> Pair:
    """How many of a shape there are, whether the named object is one of them, and how many stay."""
    named = [i for i in range(len(view.attributes)) if view.masks(i)]
    if not named:  # all alike
        count, noun, nouns = len(view.attributes), view.words.noun, view.words.nouns
        rest = f"{_number(count, noun, nouns)} now. So {NUMBERS[count - 1]} would be left."
        return _LEFT.format(ref=f"one {noun}", terms=nouns), rest
    taken = stream.choice(named)
    ref = view.reference(taken, stream.choice(view.masks(taken)))
    term = stream.choice(view.attributes)
    one, many = (phrase(view.scene.domain, SHAPE, term, plural) for plural in (False, True))
    count, among = view.matching(SHAPE, term), view.attributes[taken][1] == term[1]
    told = f"{_number(count, one, many)} now. {_capital(ref)} is {'' if among else 'not '}one of them."
    left = count - among
    rest = f"So {NUMBERS[left] if left else 'none'} would be left."
    return _LEFT.format(ref=ref, terms=many), f"{told} {rest}"


def _way(view: View, stream: Stream) -> Pair | None:
    """Where both are, and how many rows and columns lie between them."""
    named = stream.shuffled([i for i in range(len(view.attributes)) if view.masks(i)])
    if len(named) < 2:
        return None
    first, second = (view.scene.objects[i] for i in named[:2])
    ref, other = (view.reference(i, stream.choice(view.masks(i))) for i in named[:2])
    steps = [
        _steps(second.row - first.row, ("up", "down"), "row"),
        _steps(second.col - first.col, ("left", "right"), "column"),
    ]
    told = f"{_capital(ref)} is in {cell_words(first)}. {_capital(other)} is in {cell_words(second)}."
    return _WAY.format(ref=ref, other=other), f"{told} So go {joined([step for step in steps if step])}."


def _steps(count: int, ways: tuple[str, str], noun: str) -> str:
    """``two rows down``; empty for none."""
    many = abs(count)
    return f"{NUMBERS[many]} {noun}{'' if many == 1 else 's'} {ways[count > 0]}" if many else ""


_REASONING: tuple[Callable[[View, Stream], Pair | None], ...] = (_halves, _left, _way)


def _reasoned(scene: Scene, stream: Stream) -> list[Pair]:
    """One question of each sort that the scene allows, in random order, at most two."""
    view = View(scene)
    asked = (write(view, stream) for write in stream.shuffled(_REASONING))
    return [pair for pair in asked if pair is not None][:2]


_WRITERS: dict[Written, Callable[[Scene, Stream], Sequence[Pair]]] = {
    "conversation": _conversation,
    "detail": _detailed,
    "reasoning": _reasoned,
}


class WorldWritten(ScaledSource):
    """Samples of three types written from scenes under LLaVA's system line.

    Args:
        split, size, seed, domain: as for every source of the world.
        types: which of them; null: conversation, detail, reasoning.
        shares: of the types, in any unit; null: those of LLaVA-Instruct-158k.
        multi_turn: whole conversations, for training; False: one question a sample, types in turn, for benchmarks.
        grid, objects: the scenes' scale.

    Raises:
        UserError: as for every source of the world, an unknown type, or shares that do not fit the types.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        types: Annotated[Sequence[Written], MinLen(1)] | None = None,
        shares: Sequence[NotNegative] | None = None,
        multi_turn: bool = True,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(split, size, **scenes)
        chosen = WRITTEN if types is None else tuple(types)
        unknown = [name for name in chosen if name not in WRITTEN]
        if unknown or not chosen:
            wrong = f"no type {unknown[0]!r}" if unknown else "no type at all"
            raise UserError(f"Written instructions have {wrong}; set types to some of: {', '.join(WRITTEN)}.")
        given = [SHARES[WRITTEN.index(name)] for name in chosen] if shares is None else [float(s) for s in shares]
        if len(given) != len(chosen) or min(given) < 0 or not sum(given):
            raise UserError(f"shares={given} do not fit types={[*chosen]}; give one number from 0 for each.")
        self.types, self.shares, self.multi_turn = chosen, tuple(given), multi_turn

    def _unrendered(self, index: int) -> Unrendered:
        scene, stream = self._scene(index), self._stream(index, "written")
        kind = self.types[stream.weighted(self.shares) if self.multi_turn else index % len(self.types)]
        pairs = list(_WRITERS[kind](scene, stream))
        turns = [Turn(prompt, answer, kind) for prompt, answer in pairs]
        told = turns if self.multi_turn else [stream.choice(turns)]
        return Unrendered(f"{scene.id}/{kind}", (scene,), tuple(told), SYSTEM)


class WorldWrittenInstruct(WorldInstruct):
    """Instruction tuning in which some samples are written in whole sentences, see `WorldWritten`.

    The others are those of ``WorldInstruct``, answered in a word, without a system line.

    Args:
        split, size, seed, domain: as for every source of the world.
        caption_fraction: share of caption samples among the others, half of them short, in 0..1.
        kinds: kinds of question asked there; all of them for None.
        written_fraction: share of written samples, in 0..1.
        types, shares: as for `WorldWritten`.
        grid, objects: the scenes' scale.

    Raises:
        UserError: as for ``WorldInstruct`` and `WorldWritten`.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        written_fraction: Share = 0.5,
        types: Annotated[Sequence[Written], MinLen(1)] | None = None,
        shares: Sequence[NotNegative] | None = None,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        check_share("written_fraction", written_fraction)
        self.written_fraction = written_fraction
        self._written = WorldWritten(split, size, types, shares, **self.drawn)
        self.types, self.shares = self._written.types, self._written.shares

    def _unrendered(self, index: int) -> Unrendered:
        if self._stream(index, "instruct/written").chance(self.written_fraction):
            return self._written._unrendered(index)
        return super()._unrendered(index)

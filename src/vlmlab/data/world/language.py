"""A second language for the embedded world: every word of the first has one counterpart, and the grammar is the same.

It stands for the translated instructions of PALO (arXiv 2402.14818) and Ziya-VL, and its mixture with the first for the
code-mixed ones of Dhenu. The words are coined, so that no tower has met them; nothing else sets a language apart here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Literal, Unpack, get_args

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Turn
from vlmlab.contracts.values import Count, Share
from vlmlab.data.world.base import ScaledSceneKeys, Unrendered, check_share
from vlmlab.data.world.scene import Split
from vlmlab.data.world.sources import InstructKeys, QuestionKeys, Style, WorldCaptions, WorldInstruct, WorldQuestions
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import DOMAINS, lexicon

Language = Literal["first", "second", "mixed"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
_CONSONANTS, _VOWELS, _ENDS = "bdfghjklmnprstvz", "aeiou", "lnrs"
_KEY = "second language 1"
"""Chosen so that no two words of the world have the same counterpart."""
_WORD = re.compile(r"<[^<>]*>|[A-Za-z]+")


def coined(stream: Stream) -> str:
    """A made-up word of two syllables, such as ``dokan``."""
    letters = (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _ENDS)
    return "".join(stream.choice(kinds) for kinds in letters)


@cache
def counterpart(word: str) -> str:
    """The second language's word for one of the first, always the same."""
    told = coined(Stream(_KEY, word.lower()))
    return told.capitalize() if word[0].isupper() else told


@cache
def content_words() -> frozenset[str]:
    """Words for what is seen, of all domains: those that code-mixed sentences keep in the first language."""
    words: set[str] = set()
    for domain in DOMAINS:
        own = lexicon(domain)
        for group in (
            own.colors,
            own.shapes,
            own.plurals,
            own.sizes,
            own.synonyms,
            own.textures,
            (own.noun, own.nouns),
        ):
            words.update(group)
    return frozenset(words)


def translate(text: str, language: Language) -> str:
    """A sentence of the world in a language; digits, marks and what is in ``<...>`` stay as they are.

    Args:
        text: in the first language.
        language: ``second``: every word; ``mixed``: all but the words for what is seen; ``first``: none.
    """
    if language == "first":
        return text
    kept = content_words() if language == "mixed" else frozenset()

    def told(found: re.Match[str]) -> str:
        word = found.group()
        return word if word.startswith("<") or word.lower() in kept else counterpart(word)

    return _WORD.sub(told, text)


def _translated(turn: Turn, language: Language) -> Turn:
    references = tuple(translate(text, language) for text in turn.references)
    prompt, answer = translate(turn.prompt, language), translate(turn.answer, language)
    return replace(turn, prompt=prompt, answer=answer, references=references)


def _in(sample: Unrendered, language: Language) -> Unrendered:
    """A sample all of whose turns are in a language; of the first language as it is."""
    if language == "first":
        return sample
    return replace(sample, turns=tuple(_translated(turn, language) for turn in sample.turns))


def _check_shares(second: float, mixed: float) -> None:
    check_share("second_fraction", second)
    check_share("mixed_fraction", mixed)
    if second + mixed > 1:
        raise UserError(f"second_fraction={second} and mixed_fraction={mixed} are more than 1; lower one of them.")


def _drawn(stream: Stream, second: float, mixed: float) -> Language:
    return LANGUAGES[stream.weighted((1 - second - mixed, second, mixed))]


class BilingualCaptions(WorldCaptions):
    """``WorldCaptions`` of which a share is asked and answered in the second language.

    Args:
        style, split, size, seed, domain, grid, objects: as for ``WorldCaptions``.
        second_fraction: share of samples in the second language, in 0..1.

    Raises:
        UserError: as for ``WorldCaptions``, or a fraction outside 0..1.
    """

    def __init__(
        self,
        style: Style,
        split: Split,
        size: Count,
        second_fraction: Share = 0.5,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(style, split, size, **scenes)
        _check_shares(second_fraction, 0.0)
        self.second_fraction = second_fraction

    def _unrendered(self, index: int) -> Unrendered:
        return _in(super()._unrendered(index), _drawn(self._stream(index, "language"), self.second_fraction, 0.0))


class BilingualInstruct(WorldInstruct):
    """``WorldInstruct`` of which a share of samples is in the second language, and a share in both at once.

    Args:
        split, size, seed, domain, caption_fraction, kinds, grid, objects: as for ``WorldInstruct``.
        second_fraction: share of samples in the second language, in 0..1.
        mixed_fraction: share of code-mixed samples: words for what is seen in the first, all others in the second.

    Raises:
        UserError: as for ``WorldInstruct``, or fractions that do not fit into 0..1 together.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        second_fraction: Share = 0.5,
        mixed_fraction: Share = 0.0,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        _check_shares(second_fraction, mixed_fraction)
        self.second_fraction, self.mixed_fraction = second_fraction, mixed_fraction

    def _unrendered(self, index: int) -> Unrendered:
        language = _drawn(self._stream(index, "language"), self.second_fraction, self.mixed_fraction)
        return _in(super()._unrendered(index), language)


class BilingualQuestions(WorldQuestions):
    """``WorldQuestions`` in one language: the same scenes, questions and answers in each.

    Args:
        split, size, seed, domain, multi_turn, kinds, grid, objects: as for ``WorldQuestions``.
        language: first, second or mixed (see `translate`).

    Raises:
        UserError: as for ``WorldQuestions``, or an unknown language.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        language: Language = "second",
        **others: Unpack[QuestionKeys],
    ) -> None:
        super().__init__(split, size, **others)
        if language not in LANGUAGES:
            raise UserError(f"The world has no language {language!r}; set language to one of: {', '.join(LANGUAGES)}.")
        self.language = language

    def _unrendered(self, index: int) -> Unrendered:
        return _in(super()._unrendered(index), self.language)

from __future__ import annotations

import re

import numpy as np
import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.language import (
    LANGUAGES,
    BilingualCaptions,
    BilingualInstruct,
    BilingualQuestions,
    content_words,
    counterpart,
    translate,
)
from vlmlab.data.world.sources import WorldCaptions, WorldInstruct, WorldQuestions
from vlmlab.data.world.words import lexicon
from vlmlab.evaluate.metrics.vqa import normalise


def words(text: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Za-z]+", text)]


def test_no_two_words_of_the_world_have_one_counterpart() -> None:
    """Nor is a counterpart a word of the first language, or changed by the normalisation of answers."""
    known: set[str] = set(content_words())
    for source in (WorldInstruct("train", 300), WorldCaptions("mixed", "train", 100)):
        for index in range(len(source)):
            for turn in source.turns(index):
                known.update(w for text in (turn.prompt, turn.answer, *turn.references) for w in words(text))
    told = {counterpart(word) for word in known}
    assert len(known) > 100 and len(told) == len(known) and not told & known
    assert all(normalise(word) == word for word in told)
    assert counterpart("red") == "zohul"  # golden: other words are another language, and other data


def test_a_sentence_word_by_word() -> None:
    text = "<image> What color is the red circle, 2 of them?"
    assert translate(text, "first") == text
    second = translate(text, "second")
    assert second.startswith("<image> ") and second.endswith("?") and ", 2 " in second
    assert words(second.removeprefix("<image>")) == [counterpart(w) for w in words(text.removeprefix("<image>"))]
    assert second.split()[1][0].isupper()
    mixed = translate(text, "mixed")
    assert words(mixed.removeprefix("<image>")) == [
        w if w in ("red", "circle") else counterpart(w) for w in words(text.removeprefix("<image>"))
    ]
    assert set(lexicon("base").plurals) < content_words() and "color" not in content_words()


def test_the_second_language_asks_the_same_about_the_same_pictures() -> None:
    first, second = WorldQuestions("test", 30), BilingualQuestions("test", 30)
    for index in range(30):
        (a,), (b,) = first.turns(index), second.turns(index)
        assert (b.prompt, b.answer) == (translate(a.prompt, "second"), translate(a.answer, "second"))
        assert (a.kind, a.chance, a.group) == (b.kind, b.chance, b.group)
    assert np.array_equal(first[4].images[0], second[4].images[0]) and first[4].id == second[4].id


def test_shares_of_languages_and_the_first_unchanged() -> None:
    plain, both = WorldInstruct("train", 200), BilingualInstruct("train", 200, second_fraction=0.4, mixed_fraction=0.2)
    told = {
        name: [i for i in range(200) if both.turns(i)[0].prompt == translate(plain.turns(i)[0].prompt, name)]
        for name in LANGUAGES  # a sentence without a content word is the same code-mixed
    }
    assert [len(told[name]) / 200 for name in LANGUAGES] == pytest.approx([0.4, 0.4, 0.2], abs=0.14)
    assert set().union(*told.values()) == set(range(200)) and all(
        both.turns(i) == plain.turns(i) for i in told["first"]
    )
    for index in told["second"][:3]:
        answers = [turn.answer for turn in plain.turns(index)]
        assert [turn.answer for turn in both.turns(index)] == [translate(answer, "second") for answer in answers]
    captions = BilingualCaptions("short", "train", 100, second_fraction=1.0)
    for index in range(10):
        (turn,), (first,) = captions.turns(index), WorldCaptions("short", "train", 100).turns(index)
        assert turn.references == tuple(translate(text, "second") for text in first.references)
        assert turn.answer in turn.references


def test_languages_and_shares_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="no language 'third'"):
        BilingualQuestions("test", 1, language="third")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="more than 1"):
        BilingualInstruct("train", 1, second_fraction=0.7, mixed_fraction=0.7)
    with pytest.raises(UserError, match="second_fraction"):
        BilingualCaptions("short", "train", 1, second_fraction=2)

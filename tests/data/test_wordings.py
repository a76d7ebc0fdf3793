"""The same questions in several wordings."""

from __future__ import annotations

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.wordings import Wordings

WORDS = {"plain": "{question}", "asked": "Say {in} one word: {question}!"}


def test_every_question_in_every_wording() -> None:
    last = Turn("what", "two", "k", group="g", options=("two", "no"))
    first = Sample("a", (tiny.picture(1),), (Turn("how", "red"), last))
    second = Sample("b", (tiny.picture(2),), (Turn("<image>\nwhere", "no"),))
    worded = Wordings([first, second], WORDS)
    assert len(worded) == 4
    assert [worded[k].id for k in range(4)] == ["a/plain", "a/asked", "b/plain", "b/asked"]
    assert [worded[k].turns[-1].prompt for k in range(4)] == [
        "what", "Say {in} one word: what!", "<image>\nwhere", "<image>\nSay {in} one word: where!",
    ]  # fmt: skip
    assert [turn.group for k in range(4) for turn in worded.turns(k)[-1:]] == ["plain", "asked"] * 2
    assert worded[1].turns[0] == first.turns[0] and worded[1].turns[1].options == ("two", "no")
    with pytest.raises(IndexError):
        worded[4]


def test_what_is_no_choice_of_wordings() -> None:
    with pytest.raises(UserError, match="wordings has 1 of them; give two or more"):
        Wordings([], {"plain": "{question}"})
    with pytest.raises(UserError, match=r"wordings\.b needs \{question\} once"):
        Wordings([], {"a": "{question}", "b": "say"})


def test_the_worlds_benchmark() -> None:
    node = OmegaConf.load(tiny.CONF / "benchmark/world_wordings.yaml").world_wordings
    worded = instantiate(node.source)
    assert len(worded) == 5 * 420 and len({worded.turns(k)[0].prompt for k in range(5)}) == 5
    assert len({worded.turns(k)[0].answer for k in range(5)}) == 1
    made = [instantiate(metric, _partial_=True) for metric in node.metrics]
    assert [type(make()).__name__ for make in made] == ["VqaAccuracy", "Sensitivity"]

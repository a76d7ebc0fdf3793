"""Questions whose answers are a closed set."""

from __future__ import annotations

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.options import ClosedAnswers

ANSWERS = [("Yes", "a"), ("red", "b"), ("no", "b"), ("maybe", "b"), ("blue", "c")]


class Source(list):  # type: ignore[type-arg]
    """Some samples."""


SOURCE = Source(
    Sample(str(k), (), (Turn("first", "one"), Turn("q", said, kind, ("yes", "no", "red"))))
    for k, (said, kind) in enumerate(ANSWERS)
)


def test_questions_of_closed_answers() -> None:
    kept = ClosedAnswers(SOURCE, [["yes", "no"], ["red", "blue"]])
    assert [kept[k].id for k in range(len(kept))] == ["0", "1", "2", "4"]
    assert [kept.turns(k)[-1].options for k in range(4)] == [("yes", "no"), ("red", "blue")] * 2
    assert kept[0].turns == kept.turns(0) and kept[0].turns[0].options == () and kept.label(3) == "4"
    last = kept.turns(0)[-1]
    assert (last.answer, last.references) == ("yes", ()), "what single annotators say is not right as well"
    of_kind = ClosedAnswers(SOURCE, [["yes", "no"], ["red", "blue"]], kinds=["b", "c"])
    assert [of_kind[k].id for k in range(len(of_kind))] == ["1", "2", "4"]
    assert kept.fingerprint() != of_kind.fingerprint()


def test_what_cannot_be_closed() -> None:
    with pytest.raises(UserError, match="'no' is twice in sets"):
        ClosedAnswers(SOURCE, [["yes", "no"], ["no", "one"]])
    with pytest.raises(UserError, match="no question of 5 has an answer among green, black"):
        ClosedAnswers(SOURCE, [["green", "black"]])


def test_the_worlds_sets_are_all_of_its_answers() -> None:
    """But for comparisons, whose answers depend on the question; the stated chance stays."""
    node = OmegaConf.load(tiny.CONF / "benchmark/world_options.yaml").world_options.source
    node.source.size = 210
    kept = instantiate(node)
    assert len(kept) == 180
    turns = [kept.turns(k)[0] for k in range(180)]
    assert all(turn.answer in turn.options and turn.chance is not None for turn in turns)
    assert {turn.kind for turn in turns} == {*node.kinds} and {len(turn.options) for turn in turns} == {2, 4, 6, 8}

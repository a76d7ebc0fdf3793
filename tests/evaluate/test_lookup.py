"""The lookup floor: counted by hand, ties and unseen words, what of a run's data it is made of, and no pixel made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.sampler import Order
from vlmlab.data.world import base
from vlmlab.evaluate.lookup import Lookup, commonest, training_turns

TAUGHT = [
    Turn("<image>\nWhat organ  is it?", "Liver", "open"),
    Turn("What organ is it?", "the liver", "open"),
    Turn("What organ is it? <image>", "lung", "open"),
    Turn("Is it big?", "yes", "closed"),
    Turn("Is it big?", "no", "closed"),
    Turn("Is it round?", "no", "closed"),
    Turn("Where is it?", "left", "open"),
    Turn("Where is it?", "lung", "open"),
    Turn("Which plane?", "lung", "open"),
]


@pytest.mark.parametrize(
    ("prompt", "kind", "answer"),
    [
        ("What organ is it?", "open", "Liver"),  # two spellings of one answer beat "lung"; equal ones by the alphabet
        ("<image> What organ is\nit?", "", "Liver"),  # tags and blanks are not words, and the words go before the kind
        ("Is it big?", "closed", "no"),  # one each
        ("Is it flat?", "closed", "no"),  # unseen words: two of three closed questions
        ("What shape is it?", "open", "lung"),  # three of six open ones
        ("What shape is it?", "number", "lung"),  # unseen kind: three of all nine; "no" and "liver" two each
    ],
)
def test_words_then_kind_then_all(prompt: str, kind: str, answer: str) -> None:
    assert Lookup(TAUGHT).answer(prompt, kind) == answer
    assert Lookup(reversed(TAUGHT)).answer(prompt, kind) == answer


def test_without_training_questions_there_is_no_answer() -> None:
    assert Lookup([]).answer("Is it big?", "closed") == ""


def test_the_spelling_is_one_that_was_taught() -> None:
    """Where ten people agree to the letter, answers are compared to the letter."""
    assert commonest({"a cat": 2, "Cat.": 3, "dog": 4}) == "Cat."
    assert commonest({"b": 1, "a": 1}) == "a" and commonest({"one": 1}) == "one"


# -- what of a run it is made of ---------------------------------------------------------------------------------------


class Numbered:
    """Samples whose question is their number."""

    def __init__(self, size: int, in_memory: bool = False, broken: int = -1) -> None:
        self.size, self.turns_in_memory, self.broken = size, in_memory, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("no sample is loaded whole")

    def turns(self, index: int) -> tuple[Turn, ...]:
        if index == self.broken:
            raise DataError("a bad row")
        return (Turn(f"{index}?", "yes"), Turn(f"{index}!", "no"))


def config(steps: int, source: dict[str, object], **more: object) -> DictConfig:
    stage = {"module": "a.Module", "train": {"lm": 1e-3}, "data": "quiz", "batch_size": 4, "objective": {"lm": 1}}
    target = {"_target_": "tests.evaluate.test_lookup.Numbered", **source}
    return OmegaConf.create(
        {
            "recipe": {"stages": {"idle": {**stage, "steps": 0}, "ask": {**stage, "steps": steps}}},
            "data": {"train": {"quiz": target}},
            "seed": 3,
            **more,
        }
    )


def numbers(turns: Iterator[Turn]) -> list[int]:
    return [int(turn.prompt[:-1]) for turn in turns if turn.prompt.endswith("?")]


def test_it_is_made_of_the_samples_that_the_stages_draw() -> None:
    found = list(training_turns(config(3, {"size": 1000}), 50))
    drawn = [index for step in range(3) for index in Order(1000, 4, 3, "ask").window(step)]
    assert numbers(iter(found)) == sorted(drawn) and len(found) == 24  # every turn of a sample


def test_costly_turns_are_bounded_and_those_in_memory_are_not() -> None:
    assert len(numbers(training_turns(config(30, {"size": 1000}), 50))) == 50
    assert len(numbers(training_turns(config(30, {"size": 1000, "in_memory": True}), 50))) == 120
    assert numbers(training_turns(config(30, {"size": 7, "in_memory": True}), 50)) == list(range(7))  # each once
    few = config(30, {"size": 1000}, debug={"overfit": 5})
    assert numbers(training_turns(few, 50)) == list(range(5))


def test_rows_that_cannot_be_used_teach_nothing() -> None:
    assert numbers(training_turns(config(3, {"size": 6, "broken": 2}), 50)) == [0, 1, 3, 4, 5]


def test_the_world_is_not_drawn_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "render", lambda scene: pytest.fail("an image was drawn"))
    cfg = config(2, {})
    cfg.data.train.quiz = {"_target_": "vlmlab.data.world.sources.WorldInstruct", "split": "train", "size": 100000}
    kinds = {turn.kind for turn in training_turns(cfg, 2000)}
    assert {"attribute", "existence", "count"} <= kinds

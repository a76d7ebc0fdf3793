from collections import Counter, defaultdict

import numpy as np
import pytest

from vlmlab.data.world import base
from vlmlab.data.world.balance import WEIGHTS, targets
from vlmlab.data.world.questions import KINDS
from vlmlab.data.world.scene import STANDARD
from vlmlab.data.world.sources import WorldQuestions

TARGETS = targets(STANDARD)


@pytest.fixture(scope="module")
def undrawn():
    """Sources that do not draw: these tests look at words alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "render", lambda scene: np.zeros((1, 1, 3), np.uint8))
        yield


@pytest.fixture(scope="module")
def trained(undrawn):
    """40,000 turns of training conversations."""
    source, turns = WorldQuestions("train", 100_000, multi_turn=True), []
    for index in range(len(source)):
        turns += source[index].turns
        if len(turns) >= 40_000:
            break
    return turns


@pytest.fixture(scope="module")
def tested(undrawn):
    """4,200 benchmark questions."""
    return [sample.turns[0] for sample in WorldQuestions("test", 4200)]


def test_shares_and_weights_name_the_same_classes():
    for kind in KINDS:
        assert list(TARGETS[kind]) == list(WEIGHTS[kind])
        assert sum(TARGETS[kind].values()) == pytest.approx(1)


def test_benchmark_kinds_are_even_and_a_third_at_most_is_yes_or_no(tested, trained):
    assert set(Counter(turn.kind for turn in tested).values()) == {600}
    for turns in (tested, trained):
        assert sum(turn.answer in ("yes", "no") for turn in turns) / len(turns) <= 1 / 3


def test_training_kinds_are_nearly_even(trained):
    found = Counter(turn.kind for turn in trained)
    assert min(found.values()) / len(trained) > 0.11
    assert max(found.values()) / len(trained) < 0.17


def test_a_model_that_cannot_see_is_at_the_stated_chance(trained, tested):
    """The best blind predictor (majority answer per exact question, else per kind) learns nothing but chance."""
    by_text, by_kind = defaultdict(Counter), defaultdict(Counter)
    for turn in trained:
        by_text[turn.prompt][turn.answer] += 1
        by_kind[turn.kind][turn.answer] += 1
    right, stated, number = Counter(), Counter(), Counter()
    for turn in tested:
        guess = (by_text.get(turn.prompt) or by_kind[turn.kind]).most_common(1)[0][0]
        right[turn.kind] += guess == turn.answer
        stated[turn.kind] += turn.chance
        number[turn.kind] += 1
    for kind in KINDS:
        blind, chance = right[kind] / number[kind], stated[kind] / number[kind]
        assert blind <= chance + 0.04, (kind, blind, chance)
        if kind not in ("relation", "two_hop"):  # most of their texts occur once: the majority knows nothing
            assert blind >= chance - 0.05, (kind, blind, chance)


def test_answers_are_balanced_within_each_template(tested):
    """Counts, comparisons, relations and positions: each answer equally often."""
    found = defaultdict(Counter)
    for turn in tested:
        found[turn.kind][turn.answer] += 1
    for kind in ("relation", "position", "existence"):
        values = found[kind].values()
        assert max(values) - min(values) < 0.25 * sum(values) / len(values), (kind, found[kind])
    assert abs(found["comparison"]["equal"] / 600 - 1 / 3) < 0.05


def test_training_answers_follow_the_targets(trained):
    counts = Counter(turn.answer for turn in trained if turn.kind == "count")
    wanted = Counter()
    for (_, key), share in TARGETS["count"].items():
        wanted[key] += share
    for answer, share in wanted.items():
        assert abs(counts[answer] / sum(counts.values()) - share) < 0.03
    compared = Counter(turn.answer for turn in trained if turn.kind == "comparison")
    assert abs(compared["equal"] / sum(compared.values()) - 1 / 3) < 0.03


def test_fit_reproduces_the_stored_weights_roughly():
    """Starting from the targets, the fit moves in the direction of what is stored: rare answers gain."""
    from vlmlab.data.world.fitting import fit

    weights = fit(scenes=300, rounds=2)
    assert weights["count"]["color", "5"] > 3 * weights["count"]["color", "1"]
    assert weights["comparison"]["size", "equal"] > weights["comparison"]["size", "first"]

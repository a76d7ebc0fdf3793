"""Several questions about the same images: apart, as one tree, and which samples stay conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import (
    ADJACENT,
    ONE_TURN,
    QUESTIONS,
    SECOND_TURN,
    TAGGED,
    TEXT_ONLY,
    TWO_IMAGES,
    TWO_TURNS,
    chat,
    picture,
    supervised,
    tokenizer,
)

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.tensors import Layout, Role
from vlmlab.data.chat import ANSWER, IGNORE, USER, Encoded
from vlmlab.data.collate import Collator
from vlmlab.data.questions import joined, leading_tags, of_same_images, shared, split_questions, within


def make(questions: Any = "tree", **changes: Any) -> Collator:
    resize = lambda image: np.ascontiguousarray(image.transpose(2, 0, 1))  # noqa: E731
    return Collator(chat(), resize, tokenizer().pad_token_id, questions=questions, **changes)


# -- which samples, and what they become -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "tags"),
    [
        (TWO_TURNS, ""),
        (TAGGED, "<image> <image>\n"),
        (ADJACENT, "<image><image>"),
        (TEXT_ONLY, None),  # no image
        (SECOND_TURN, None),  # of a later turn
        (TWO_IMAGES, None),  # inside the text
        (Sample("behind", (picture(1),), (Turn("what\n<image>", "a"), Turn("how", "b"))), None),
        (Sample("too few", (picture(1), picture(2)), (Turn("<image>what", "a"), Turn("how", "b"))), None),
    ],
    ids=lambda x: getattr(x, "id", ""),
)
def test_the_images_that_a_sample_begins_with(sample: Sample, tags: str | None) -> None:
    assert leading_tags(sample) == tags


def test_each_question_is_asked_as_if_alone() -> None:
    first, second = split_questions(TAGGED)
    assert first == replace(TAGGED, turns=TAGGED.turns[:1])
    assert second.turns == (Turn("<image> <image>\nwhere", "yes"),) and second.images == TAGGED.images
    assert [one.turns for one in split_questions(TWO_TURNS)] == [(turn,) for turn in TWO_TURNS.turns]


@pytest.mark.parametrize("sample", [ONE_TURN, TEXT_ONLY, SECOND_TURN, TWO_IMAGES, ADJACENT], ids=lambda s: s.id)
def test_what_cannot_be_asked_apart_stays_a_conversation(sample: Sample) -> None:
    assert split_questions(sample) == [sample]
    whole = make("conversation")([sample])
    for questions in ("rows", "tree"):
        batch = make(questions)([sample])
        assert torch.equal(batch.input_ids, whole.input_ids) and torch.equal(batch.layout.branch, whole.layout.branch)


def test_turns_without_an_answer_are_left_out() -> None:
    silent = replace(QUESTIONS, turns=(Turn("is it", ""), *QUESTIONS.turns[1:]))
    assert [one.turns[0].prompt for one in split_questions(silent)] == ["how many", "what colour"]
    none = replace(QUESTIONS, turns=(Turn("is it", ""), Turn("how many", "")))
    with pytest.raises(DataError, match="questions has no supervised token"):
        make()([none])


# -- the tree ----------------------------------------------------------------------------------------------------------


def rows_of(layout: Layout, ids: torch.Tensor, labels: torch.Tensor, row: int, k: int) -> tuple[list[int], ...]:
    own = layout.valid[row] & ((layout.branch[row] == -1) | (layout.branch[row] == k))
    return ids[row, own].tolist(), labels[row, own].tolist(), layout.position[row, own].tolist()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
def test_every_branch_is_the_row_of_its_question(tokens: int, left: bool) -> None:
    collate = replace(make(), encoder=chat(tokens))
    samples = [QUESTIONS, ONE_TURN, TAGGED]
    batch = collate._batch(samples, [collate.encode(s)[0] for s in samples], [[0], [1], [2]], left)
    for row, sample in enumerate(samples):
        apart = [chat(tokens).train(one) for one in split_questions(sample)]
        for k, alone in enumerate(apart):
            got = rows_of(batch.layout, batch.input_ids, batch.labels, row, k)
            assert got == (alone.ids, alone.labels, list(range(len(alone.ids))))
        assert batch.layout.branch[row].max() == (len(apart) - 1 if len(apart) > 1 else -1)
        trunk = batch.layout.branch[row] == -1
        assert not (batch.layout.role[row, trunk & batch.layout.valid[row]] == Role.ANSWER).any() or len(apart) == 1
    assert batch.images.row.tolist() == [0, 1, 2, 2] and batch.images.turn.tolist() == [0] * 4
    assert batch.supervised == sum(map(len, supervised(make("rows")(samples))))


def test_the_images_are_read_once() -> None:
    rows, tree = make("rows")([QUESTIONS, TAGGED]), make()([QUESTIONS, TAGGED])
    assert len(rows.pixels) == 3 * 1 + 2 * 2 and len(tree.pixels) == 1 + 2
    assert rows.sample_ids == [["questions"]] * 3 + [["tagged"]] * 2 and tree.sample_ids == [["questions"], ["tagged"]]
    assert rows.images.ids[:3] == ["questions#0"] * 3 and tree.images.ids == ["questions#0", "tagged#0", "tagged#1"]
    assert int(tree.layout.visual.sum()) == 3 * 3 < int(rows.layout.visual.sum())


def test_trees_are_packed_by_their_whole_length() -> None:
    lengths = [len(make().encode(sample)[0].ids) for sample in (QUESTIONS, TAGGED, ONE_TURN)]
    exact = make(pack_length=sum(lengths))([QUESTIONS, TAGGED, ONE_TURN])
    assert exact.sample_ids == [["questions", "tagged", "one"]] and exact.layout.valid.all()
    assert len(make(pack_length=sum(lengths) - 1)([QUESTIONS, TAGGED, ONE_TURN]).input_ids) == 2
    assert exact.layout.era.max() == max(map(len, supervised(make("rows")([QUESTIONS, TAGGED, ONE_TURN]))))


def test_questions_with_the_same_words_keep_a_token_of_their_own() -> None:
    twice = replace(QUESTIONS, turns=QUESTIONS.turns[:1] * 2)
    (tree,) = make().encode(twice)
    assert tree.branch.count(0) == tree.branch.count(1) and max(tree.branch) == 1
    starts = [tree.branch.index(k) for k in (0, 1)]
    assert [tree.labels[i] for i in starts] == [IGNORE] * 2 and [tree.roles[i] for i in starts] == [USER] * 2


def test_a_tree_longer_than_a_sample_may_be_is_several() -> None:
    (whole,) = make().encode(QUESTIONS)
    collate = make()
    collate.encoder.max_length = len(whole.ids) - 1
    trees = collate.encode(QUESTIONS)
    assert [max(tree.branch, default=-1) for tree in trees] == [1, -1], "two questions, and one by itself"
    assert all(len(tree.ids) <= collate.encoder.max_length for tree in trees)
    assert len(collate([QUESTIONS]).pixels) == 2
    collate.encoder.max_length = 5
    with pytest.raises(DataError, match="over max_length=5"):
        collate([QUESTIONS])


def encoded(*ids: int, answered: int = 1, places: tuple[int, ...] = ()) -> Encoded:
    asked = len(ids) - answered
    roles = [USER] * asked + [ANSWER] * answered
    return Encoded([*ids], [IGNORE] * asked + [*ids[asked:]], roles, [-1] * len(ids), [*places], [0] * len(places))


def test_what_is_shared() -> None:
    assert shared([encoded(1, 2, 3, 4), encoded(1, 2, 5, 6)]) == 2
    assert shared([encoded(1, 2, 3, 4), encoded(1, 2, 3, 4)]) == 2, "the token before the answer is the question's own"
    assert shared([encoded(7, 2), encoded(8, 2)]) == 0
    assert [len(some) for some in within([encoded(1, k, 9) for k in range(5)], 5)] == [2, 2, 1]
    assert [len(some) for some in within([encoded(1, k, 9) for k in range(3)], 2)] == [1, 1, 1]


@pytest.mark.parametrize("second", [encoded(1, 5, 4, 9, places=(2,)), encoded(1, 2, 4, 9, places=(3,))])
def test_a_template_with_the_question_before_the_image_is_refused(second: Encoded) -> None:
    with pytest.raises(UserError, match=r"Sample x: the chat template puts .*set collate.questions=rows"):
        joined([encoded(1, 2, 3, 9, places=(2,)), second], "x")


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_about_the_same_images_are_branches_in_their_order() -> None:
    first, *more = split_questions(replace(QUESTIONS, image_ids=("a",)))
    other = replace(more[0], images=(picture(20),))  # the same name for another picture
    samples = [first, more[0], ONE_TURN, more[1], other, TEXT_ONLY, TEXT_ONLY]
    assert list(of_same_images(samples)) == [[0, 1], [2], [3], [4], [5], [6]]
    batch = make().ask(samples)
    assert batch.layout.branch.amax(1).tolist() == [1, -1, -1, -1, -1, -1] and batch.layout.valid[:, -1].all()
    assert batch.supervised == 0 and len(batch.pixels) == 4
    for k, sample in enumerate(samples[:2]):
        assert rows_of(batch.layout, batch.input_ids, batch.labels, 0, k)[0] == chat().ask(sample).ids
    assert make("rows").ask(samples).layout.branch.max() == -1
    assert list(of_same_images([])) == []


def test_other_system_lines_and_tags_are_not_shared() -> None:
    first, second = split_questions(replace(QUESTIONS, image_ids=("a",)))[:2]
    assert list(of_same_images([first, replace(second, system="be brief")])) == [[0], [1]]
    tagged = replace(second, turns=(Turn("<image> how", "a"),))
    assert list(of_same_images([first, tagged])) == [[0], [1]]

"""The wrong-image derangement and the image-free view of a data set."""

from __future__ import annotations

import numpy as np
import pytest

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Image, Sample, Turn
from vlmlab.evaluate.baselines import Limited, NoImage, Shuffled, image_names


def picture(value: int) -> Image:
    return np.full((4, 4, 3), value, np.uint8)


def one(index: int, image: int) -> Sample:
    return Sample(f"s{index}", (picture(image),), (Turn("<image>what is it?", "thing"),), image_ids=(f"i{image}",))


SOURCE = [one(index, index // 2) for index in range(10)]  # two questions about each of five images


def test_every_sample_gets_another_image_and_the_same_one_as_its_neighbour() -> None:
    shuffled = Shuffled(SOURCE)
    for index, sample in enumerate(SOURCE):
        wrong = shuffled[index]
        assert wrong.image_ids != sample.image_ids
        assert f"i{wrong.images[0][0, 0, 0]}" == wrong.image_ids[0]
        assert (wrong.id, wrong.turns) == (sample.id, sample.turns)
        assert wrong.image_ids == shuffled[index ^ 1].image_ids


def test_it_is_a_derangement_of_the_images_and_always_the_same() -> None:
    first, again = Shuffled(SOURCE), Shuffled(SOURCE)
    shown = [first[i].image_ids for i in range(0, 10, 2)]
    assert sorted(shown) == [(f"i{i}",) for i in range(5)]
    assert shown == [again[i].image_ids for i in range(0, 10, 2)]
    assert shown != [Shuffled(SOURCE, seed=1)[i].image_ids for i in range(0, 10, 2)]


def test_number_of_images_stays_and_shared_images_are_avoided() -> None:
    pair = Sample("p", (picture(0), picture(1)), (Turn("q", "a"),), image_ids=("i0", "i1"))
    wrong = Shuffled([pair, one(1, 0), one(2, 7)])[0]
    assert wrong.image_ids == ("i7", "i7")


def test_one_image_cannot_be_shuffled() -> None:
    with pytest.raises(DataError, match="at least two different images"):
        Shuffled([one(0, 0), one(1, 0)])[0]


def test_the_first_samples_of_one_image_get_one_from_behind_them() -> None:
    shuffled = Shuffled(Limited(SOURCE, 2))
    assert len(shuffled) == 2 and [shuffled[i].image_ids for i in (0, 1)] == [("i1",)] * 2
    assert {shuffled[i].id for i in (0, 1)} == {"s0", "s1"}
    four = [Shuffled(source)[i].image_ids for source in (Limited(SOURCE, 4), SOURCE[:4]) for i in range(4)]
    assert four[:4] == four[4:]  # otherwise the limit is the whole set


def test_text_only_samples_stay() -> None:
    text = Sample("t", (), (Turn("q", "a"),))
    assert Shuffled([text, one(1, 1), one(2, 2)])[0] == text


def test_no_image_removes_images_and_tags() -> None:
    bare = NoImage(SOURCE)[0]
    assert bare.images == () and bare.image_ids == ()
    assert bare.turns[0].prompt == "what is it?" and bare.turns[0].answer == "thing"


def test_limit() -> None:
    assert len(Limited(SOURCE, 3)) == 3 and len(Limited(SOURCE)) == 10 and len(Limited(SOURCE, 99)) == 10
    with pytest.raises(IndexError):
        Limited(SOURCE, 3)[3]


def test_unnamed_images_are_named_after_their_sample() -> None:
    assert image_names(Sample("x", (picture(0), picture(1)), (Turn("q", "a"),))) == ("x#0", "x#1")

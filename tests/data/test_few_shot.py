from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample
from vlmlab.data.few_shot import FewShot
from vlmlab.data.fingerprint import source_fingerprint
from vlmlab.data.overlap import reads
from vlmlab.data.world.sources import WorldCaptions, WorldQuestions
from vlmlab.evaluate.baselines import Limited, NoImage, Shuffled, image_names

TEST, POOL = WorldQuestions("test", 40), WorldQuestions("train", 400)


def prompts(sample: Sample) -> list[str]:
    return [turn.prompt.replace(IMAGE_TAG, "").strip() for turn in sample.turns]


def test_a_question_follows_examples_of_its_kind() -> None:
    source = FewShot(TEST, POOL, shots=3)
    assert len(source) == 40
    pool = {turn.prompt for index in range(400) for turn in POOL.turns(index)}
    for index in range(7):
        sample, own = source[index], TEST[index]
        assert sample.id == own.id and len(sample.images) == len(sample.image_ids) == 4
        assert sample.turns[-1].answer == own.turns[0].answer and prompts(sample)[-1] == own.turns[0].prompt
        assert {turn.kind for turn in sample.turns} == {own.turns[0].kind}
        assert [turn.prompt.count(IMAGE_TAG) for turn in sample.turns] == [1] * 4
        assert set(prompts(sample)[:-1]) <= pool and len(set(sample.image_ids)) == 4
        assert sample.image_ids[-1] == own.image_ids[0]
        assert (sample.images[-1] == own.images[0]).all()


def test_examples_follow_from_seed_and_number_alone() -> None:
    one, again, more = FewShot(TEST, POOL, 2), FewShot(TEST, POOL, 2), FewShot(TEST, POOL, 4)
    other = FewShot(TEST, POOL, 2, seed=1)
    for index in (7, 3):
        assert image_names(one[index]) == image_names(again[index])
        assert image_names(more[index])[:2] == image_names(one[index])[:2]  # more shots go on where fewer stop
    assert image_names(one[3]) != image_names(other[3])
    nothing = FewShot(TEST, POOL, 0)
    assert nothing[5].turns == TEST[5].turns and nothing[5].image_ids == TEST[5].image_ids


def test_shuffled_answers_are_those_of_others_of_the_kind() -> None:
    right, shuffled = FewShot(TEST, POOL, 4), FewShot(TEST, POOL, 4, answers="shuffled")
    changed = 0
    for index in range(20):
        a, b = right[index], shuffled[index]
        assert image_names(a) == image_names(b) and prompts(a) == prompts(b) and a.turns[-1] == b.turns[-1]
        changed += sum(x.answer != y.answer for x, y in zip(a.turns[:-1], b.turns[:-1], strict=True))
    assert changed > 40  # of 80; answers of one kind are often equal by chance


def test_examples_without_their_images() -> None:
    plain, text = FewShot(TEST, POOL, 2), FewShot(TEST, POOL, 2, shown=False)
    assert prompts(plain[1]) == prompts(text[1])
    assert len(text[1].images) == 1 and image_names(text[1]) == TEST[1].image_ids
    assert [turn.prompt.count(IMAGE_TAG) for turn in text[1].turns] == [0, 0, 1]


def test_baselines_take_all_images_away_or_change_them() -> None:
    source = Limited(FewShot(TEST, POOL, 2), 6)
    wrong = Shuffled(source)[0]
    assert len(wrong.images) == 3 and not set(image_names(wrong)) & set(image_names(source[0]))
    assert NoImage(source)[0].images == () and IMAGE_TAG not in "".join(
        turn.prompt for turn in NoImage(source)[0].turns
    )


def test_its_fingerprint_is_that_of_both_sources_and_the_choice() -> None:
    facts = source_fingerprint(FewShot(TEST, POOL, 2))
    assert facts == source_fingerprint(FewShot(TEST, POOL, 2))
    others = (
        FewShot(TEST, POOL, 3), FewShot(TEST, POOL, 2, seed=1), FewShot(TEST, POOL, 2, "shuffled"),
        FewShot(TEST, WorldQuestions("train", 399), 2), FewShot(TEST, POOL, 2, shown=False),
    )  # fmt: skip
    assert all(source_fingerprint(other) != facts for other in others)


def test_a_file_inside_is_found() -> None:
    within = {"_target_": "x", "source": {"_target_": "y"}, "pool": {"_target_": "z", "path": "a.json"}}
    assert reads(OmegaConf.create(within))
    assert not reads(OmegaConf.create({"_target_": "x", "source": {"_target_": "y"}, "pool": None}))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="choose from right, shuffled"):
        FewShot(TEST, POOL, 1, "wrong")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="too small"):
        FewShot(TEST, WorldCaptions("short", "train", 2), 2)
    with pytest.raises(UserError, match="single questions"):
        FewShot(TEST, WorldQuestions("train", 50, multi_turn=True), 1)[0]

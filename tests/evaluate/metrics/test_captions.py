"""Caption scores on small cases whose values are known without any file."""

from __future__ import annotations

import random

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.bleu import bleu
from vlmlab.evaluate.metrics.captions import CaptionScores
from vlmlab.evaluate.metrics.cider import cider_d
from vlmlab.evaluate.metrics.leave_one_out import leave_one_out
from vlmlab.evaluate.metrics.ptb import tokenize
from vlmlab.evaluate.metrics.rouge import longest_common_subsequence, rouge_l
from vlmlab.evaluate.metrics.rows import Row


def _words(text: str) -> list[str]:
    return text.split()


def _caption(number: int, prediction: str, *references: str) -> Row:
    return Row("captions", f"image-{number}", 0, "caption", "Describe it.", prediction, references)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('A cat\'s toy, "red" and well-lit!', "a cat 's toy red and well-lit"),
        ("They can't see; it isn't 12:45.", "they ca n't see it is n't 12:45"),
        ("Mr. Brown cannot eat 1,000 at 5 p.m.", "mr. brown can not eat 1,000 at 5 p.m."),
        ("four o'clock ... (maybe) -- yes", "four o'clock maybe yes"),
        ("50% of Canada Valve & Hydrant Co, Ltd.", "50 % of canada valve & hydrant co ltd"),
        (
            "It\N{RIGHT SINGLE QUOTATION MARK}s caf\N{LATIN SMALL LETTER E WITH ACUTE}",
            "it 's caf\N{LATIN SMALL LETTER E WITH ACUTE}",
        ),
        ("", ""),
    ],
)
def test_tokenize(text: str, words: str) -> None:
    assert tokenize(text) == words.split()


def test_cider_of_the_only_reference_is_ten() -> None:
    captions = [_words("a red circle above a small square"), _words("two blue stars in the corner now")]
    assert cider_d(captions, [[caption] for caption in captions]) == pytest.approx([10.0, 10.0])


def test_cider_golden() -> None:
    candidates = [_words("a small red circle"), _words("two blue stars"), _words("a green square")]
    references = [
        [_words("a red circle"), _words("one small red circle")],
        [_words("two stars"), _words("blue stars and a square")],
        [_words("a yellow circle")],
    ]
    by_coco_caption = [3.892302125363034, 2.1072898381494927, 0.0]  # printed by its cider_scorer.py for these captions
    assert cider_d(candidates, references) == pytest.approx(by_coco_caption, abs=1e-12)


def test_cider_ignores_words_that_every_image_has_and_order_of_images() -> None:
    candidates = [_words("a dog runs"), _words("a cat sits"), _words("a")]
    references = [[_words("a dog runs fast")], [_words("a cat sleeps here")], [_words("a bird")]]
    scores = cider_d(candidates, references)
    assert scores[2] == 0.0
    assert cider_d(candidates[::-1], references[::-1]) == pytest.approx(scores[::-1])


@pytest.mark.parametrize("images", [0, 1])
def test_cider_needs_two_images(images: int) -> None:
    with pytest.raises(UserError, match="at least 2 images"):
        cider_d([["a"]] * images, [[["a"]]] * images)


def test_cider_needs_references() -> None:
    with pytest.raises(UserError, match="reference for every image"):
        cider_d([["a"], ["b"]], [[["a"]], []])


def test_common_subsequence_against_recursion() -> None:
    def slow(first: str, second: str) -> int:
        if not first or not second:
            return 0
        if first[0] == second[0]:
            return 1 + slow(first[1:], second[1:])
        return max(slow(first[1:], second), slow(first, second[1:]))

    draw = random.Random(0)
    for _ in range(100):
        first, second = ("".join(draw.choices("abc", k=draw.randrange(7))) for _ in range(2))
        assert longest_common_subsequence(list(first), list(second)) == slow(first, second)


def test_rouge_mixes_precision_and_recall_of_references() -> None:
    candidate = _words("a b c d")
    score = rouge_l(candidate, [_words("a b c d e f g h"), _words("a b")])
    assert score == pytest.approx(1.0)  # precision 1 from the first, recall 1 from the second
    assert rouge_l([], [candidate]) == 0.0
    assert rouge_l(["x"], [candidate]) == 0.0


def test_bleu_prefers_the_shorter_of_equally_close_references() -> None:
    candidate = _words("a b c d e")
    longer, shorter = _words("a b c d e f"), _words("a b c d")
    assert bleu([candidate], [[longer, shorter]]) == pytest.approx(1.0)
    assert bleu([candidate], [[_words("a b x d e f")]]) == 0.0


def test_leave_one_out_rounds() -> None:
    seen: list[tuple[list[str], list[list[str]]]] = []

    def score(candidates: object, references: object) -> float:
        seen.append(([c[0] for c in candidates], [[r[0] for r in image] for image in references]))  # type: ignore[attr-defined]
        return float(len(seen))

    images = [[["a"], ["b"], ["c"]], [["d"], ["e"], ["f"]], [["g"], ["h"]], [["lonely"]]]
    value = leave_one_out(score, images)
    assert seen == [
        (["a", "d", "g"], [["b", "c"], ["e", "f"], ["h"]]),
        (["b", "e", "h"], [["a", "c"], ["d", "f"], ["g"]]),
        (["c", "f"], [["a", "b"], ["d", "e"]]),
    ]
    assert value == pytest.approx((3 * 1 + 3 * 2 + 2 * 3) / 8)
    others = [references for _, references in seen]
    seen.clear()
    assert leave_one_out(score, images, [["x"], ["y"], ["z"], ["alone"]]) == pytest.approx(value)
    assert [candidates for candidates, _ in seen] == [["x", "y", "z"], ["x", "y", "z"], ["x", "y"]]
    assert [references for _, references in seen] == others  # a model meets the very references that people meet
    assert leave_one_out(score, [[["a"]], [["b"]]]) is None


def test_caption_scores() -> None:
    first = ("A red circle above a square.", "one red circle over a small square", "circle above square")
    second = ("Two blue stars on the left.", "a pair of blue stars", "blue stars at the left side")
    metric = CaptionScores()
    for number, references in enumerate((first, second)):
        metric.update(_caption(number, references[0], *references))
    scores = metric.compute()
    assert scores["count"] == 2
    assert scores["bleu_4"] == pytest.approx(1.0)
    assert scores["rouge_l"] == pytest.approx(1.0)
    names = ("cider_d", "bleu_4", "rouge_l")
    assert set(scores) == {"count", *names} | {
        key for name in names for key in (f"human/{name}", f"{name}/leave_one_out")
    }
    assert 0 < scores["human/cider_d"] < scores["cider_d"]
    assert metric.predicted() == {name: scores[name] for name in names}


def test_the_model_is_compared_with_people_over_as_many_references() -> None:
    """By hand, in ROUGE-L, whose best reference counts: the caption equals the first of two references."""
    metric = CaptionScores()
    for number in range(2):
        metric.update(_caption(number, "a b c d", "a b c d", "a b x y"))
    scores = metric.compute()
    half = 0.5  # of four words two are shared in order, so precision and recall are a half
    assert scores["human/rouge_l"] == pytest.approx(half)  # each reference against the other one
    assert scores["rouge_l"] == 1.0  # against both
    assert scores["rouge_l/leave_one_out"] == pytest.approx((half + 1.0) / 2)  # against the second, then the first


def test_generated_references_are_not_called_human() -> None:
    metric = CaptionScores(references_by="grammar")
    bare = CaptionScores(references_by=None)
    for number in range(2):
        for one in (metric, bare):
            one.update(_caption(number, "a dog", f"a dog {number}", "the dog"))
    scores = metric.compute()
    assert "grammar/cider_d" in scores and not any(name.startswith("human") for name in scores)
    assert set(bare.compute()) == {"cider_d", "bleu_4", "rouge_l", "count"}
    with pytest.raises(UserError, match="references_by=robots is unknown; choose from people, grammar, or null"):
        CaptionScores(references_by="robots")


def test_caption_scores_without_several_references() -> None:
    metric = CaptionScores()
    for number in range(2):
        metric.update(_caption(number, "a dog", f"a dog {number}"))
    assert set(metric.compute()) == {"cider_d", "bleu_4", "rouge_l", "count"}


def test_caption_without_reference_is_named() -> None:
    with pytest.raises(UserError, match="image-3 of captions has no reference"):
        CaptionScores().update(_caption(3, "a dog"))

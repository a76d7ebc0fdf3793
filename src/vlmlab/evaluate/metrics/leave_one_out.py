"""Rounds that leave one reference of every image out: the score of references among themselves, and a model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Tokens = Sequence[str]
CorpusScore = Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], float]
"""Candidates and their references, one of each per image, to the score of the set."""


def leave_one_out(
    score: CorpusScore, references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens] | None = None
) -> float | None:
    """Mean of `score` over rounds; round k leaves reference k of every image out and scores against the others.

    A round counts as often as it has images. Images with one reference take no part; None when fewer than two images
    are left in every round.

    Args:
        score: of a set.
        references: all references of every image.
        candidates: what is scored in every round, one per image, so against as many references as those that are left
            out are scored against; None: the references that are left out.
    """
    given = candidates if candidates is not None else [()] * len(references)
    images = [(said, image) for said, image in zip(given, references, strict=True) if len(image) > 1]
    total, count = 0.0, 0
    for k in range(max((len(image) for _, image in images), default=0)):
        present = [(said, image) for said, image in images if k < len(image)]
        if len(present) < 2:
            continue
        scored = [image[k] if candidates is None else said for said, image in present]
        others = [[*image[:k], *image[k + 1 :]] for _, image in present]
        total += len(present) * score(scored, others)
        count += len(present)
    return total / count if count else None

"""The human ceiling: every reference scored against the other references of its image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Tokens = Sequence[str]
CorpusScore = Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], float]
"""Candidates and their references, one of each per image, to the score of the set."""


def leave_one_out(score: CorpusScore, references: Sequence[Sequence[Tokens]]) -> float | None:
    """Mean of `score` over rounds; round k takes reference k of every image as the candidate, the others as references.

    A round counts as often as it has images. Images with one reference take no part; None when fewer than two images
    are left in every round. A model is scored against one reference more than a person is, so the ceiling is
    slightly low.
    """
    images = [image for image in references if len(image) > 1]
    total, count = 0.0, 0
    for k in range(max((len(image) for image in images), default=0)):
        present = [image for image in images if k < len(image)]
        if len(present) < 2:
            continue
        candidates = [image[k] for image in present]
        others = [[*image[:k], *image[k + 1 :]] for image in present]
        total += len(present) * score(candidates, others)
        count += len(present)
    return total / count if count else None

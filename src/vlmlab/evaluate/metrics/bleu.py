"""Corpus BLEU (Papineni et al. 2002) from torchmetrics, on the same tokens as the other caption scores."""

from __future__ import annotations

from collections.abc import Sequence

Tokens = Sequence[str]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int = 4) -> float:
    """BLEU of the whole set with n-grams up to `n`, 0..1; 0 where no n-gram of some length is shared.

    torchmetrics takes the first of the references that are equally close in length, coco-caption the shorter;
    sorting by length makes them agree.
    """
    from torchmetrics.functional.text import bleu_score  # imports torch, so only when a score is asked for

    if not candidates:
        return 0.0
    predictions = [" ".join(tokens) for tokens in candidates]
    targets = [[" ".join(tokens) for tokens in sorted(image, key=len)] for image in references]
    return float(bleu_score(predictions, targets, n_gram=n))

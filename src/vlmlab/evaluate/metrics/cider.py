"""CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), in the form coco-caption reports under the name CIDEr.

Details that decide the number: document frequencies from the references of the very set, idf = log(images) - log(df);
numerator min(hypothesis, reference) x reference per n-gram over the product of the norms; a Gaussian (sigma 6) on the
difference in length, where the length is the number of bigrams; mean over n = 1..4 and over references; times 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from vlmlab.contracts.errors import UserError

Ngram = tuple[str, ...]
Tokens = Sequence[str]
LONGEST = 4
SCALE = 10.0


class _Vector:
    """tf-idf weights of one caption, per n-gram length, with their norms and the caption's length in bigrams."""

    def __init__(self, counts: Counter[Ngram], document_frequency: Counter[Ngram], log_images: float) -> None:
        self.weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            idf = log_images - math.log(max(1, document_frequency[ngram]))
            self.weights[len(ngram) - 1][ngram] = count * idf
        self.norms = [math.sqrt(sum(weight * weight for weight in level.values())) for level in self.weights]
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(self, reference: _Vector, sigma: float) -> float:
        """Clipped cosine with the length penalty, mean over n."""
        penalty = math.exp(-((self.length - reference.length) ** 2) / (2 * sigma**2))
        total = 0.0
        for n in range(LONGEST):
            theirs = reference.weights[n]
            norm = self.norms[n] * reference.norms[n]
            if norm == 0:
                continue
            shared = ((weight, theirs[ngram]) for ngram, weight in self.weights[n].items() if ngram in theirs)
            total += sum(min(mine, other) * other for mine, other in shared) / norm
        return total * penalty / LONGEST


def ngrams(tokens: Tokens) -> Counter[Ngram]:
    """How often each n-gram of length 1..4 occurs."""
    words = tuple(tokens)
    return Counter(words[i : i + n] for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of every image, 0..10; the score of the set is their mean.

    Args:
        candidates: one tokenized caption per image.
        references: the tokenized references of the same images, at least one each.
        sigma: width of the length penalty, in bigrams.

    Raises:
        UserError: fewer than two images (every idf would be log(1) = 0), or an image without a reference.
    """
    if len(candidates) < 2:
        raise UserError(
            f"CIDEr-D of {len(candidates)} image is undefined, because its word weights come from the other images; "
            "evaluate at least 2 images (budget.eval_limit)."
        )
    counted = [[ngrams(tokens) for tokens in image] for image in references]
    if not all(counted):
        raise UserError("CIDEr-D needs a reference for every image; remove the images without one from the benchmark.")
    frequency = Counter(ngram for image in counted for ngram in set().union(*image))
    log_images = math.log(len(candidates))
    scores = []
    for candidate, image in zip(candidates, counted, strict=True):
        vector = _Vector(ngrams(candidate), frequency, log_images)
        similar = [vector.similarity(_Vector(counts, frequency, log_images), sigma) for counts in image]
        scores.append(SCALE * sum(similar) / len(similar))
    return scores

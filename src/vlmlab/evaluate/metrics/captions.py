"""Caption scores of a benchmark, with the score people reach on it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.bleu import bleu
from vlmlab.evaluate.metrics.cider import cider_d
from vlmlab.evaluate.metrics.leave_one_out import CorpusScore, leave_one_out
from vlmlab.evaluate.metrics.ptb import tokenize
from vlmlab.evaluate.metrics.rouge import rouge_l
from vlmlab.evaluate.metrics.rows import Row

Tokens = Sequence[str]


def mean_cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D of a set."""
    return fmean(cider_d(candidates, references))


def mean_rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """ROUGE-L of a set."""
    return fmean(rouge_l(candidate, image) for candidate, image in zip(candidates, references, strict=True))


CORPUS_SCORES: dict[str, CorpusScore] = {"cider_d": mean_cider_d, "bleu_4": bleu, "rouge_l": mean_rouge_l}


class CaptionScores:
    """``cider_d`` (0..10), ``bleu_4`` and ``rouge_l`` (0..1), ``count``, and the same of people as ``human/<score>``.

    The human scores leave one reference out (`leave_one_out`); they are absent where images have one reference.
    """

    def __init__(self, human: bool = True) -> None:
        self.human = human
        self._candidates: list[Tokens] = []
        self._references: list[list[Tokens]] = []

    def update(self, prediction: Row) -> None:
        """Add one caption; UserError if it has no reference."""
        if not prediction.references:
            raise UserError(
                f"Caption {prediction.id} of {prediction.benchmark} has no reference; "
                "give it one or remove it from the benchmark."
            )
        self._candidates.append(tokenize(prediction.prediction))
        self._references.append([tokenize(text) for text in prediction.references])

    def predicted(self) -> dict[str, float]:
        """The scores of the captions given so far; UserError for fewer than two of them."""
        return {name: score(self._candidates, self._references) for name, score in CORPUS_SCORES.items()}

    def compute(self) -> dict[str, float]:
        """All scores, with the number of captions and the human ceiling."""
        scores = {**self.predicted(), "count": float(len(self._candidates))}
        if self.human:
            ceilings = {name: leave_one_out(score, self._references) for name, score in CORPUS_SCORES.items()}
            scores |= {f"human/{name}": value for name, value in ceilings.items() if value is not None}
        return scores

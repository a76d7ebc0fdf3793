"""Caption scores of a benchmark, with the score that its references reach among themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import ClassVar, Literal

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


Writers = Literal["people", "grammar"]
CEILINGS: dict[Writers, str] = {"people": "human", "grammar": "grammar"}
"""Who wrote the references, and the first part of the keys of their own scores."""
LEFT_OUT = "leave_one_out"


class CaptionScores:
    """``cider_d`` (0..10), ``bleu_4`` and ``rouge_l`` (0..1), ``count``, and what the references reach.

    ``human/<score>`` is the mean score of people who are each compared with the others (`leave_one_out`), so with one
    reference fewer than ``<score>``. What compares with it is ``<score>/leave_one_out``, the model's captions against
    the same references in the same rounds. Both are absent where images have one reference.

    Args:
        references_by: ``people``, or ``grammar`` for generated references, whose own score is then called
            ``grammar/<score>``; null: no such score.

    Raises:
        UserError: another word.
    """

    least_rows: ClassVar[int] = 2
    """CIDEr-D weighs words by how many other images have them."""

    def __init__(self, references_by: Writers | None = "people") -> None:
        if references_by is not None and references_by not in CEILINGS:
            choices = ", ".join(CEILINGS)
            raise UserError(f"CaptionScores: references_by={references_by} is unknown; choose from {choices}, or null.")
        self.references_by = references_by
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

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """All scores, with the number of captions and what the references reach; floors change none of them."""
        scores = {**self.predicted(), "count": float(len(self._candidates))}
        if self.references_by is None:
            return scores
        for name, score in CORPUS_SCORES.items():
            ceiling = leave_one_out(score, self._references)
            own = leave_one_out(score, self._references, self._candidates)
            if ceiling is not None and own is not None:
                scores |= {f"{name}/{LEFT_OUT}": own, f"{CEILINGS[self.references_by]}/{name}": ceiling}
        return scores

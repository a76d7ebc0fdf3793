"""A-OKVQA's score of direct answers (arXiv 2206.01718)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.rows import Row

ACCURACY = "direct_answer_accuracy"


class DirectAnswer:
    """``direct_answer_accuracy``: min(1, annotators with this answer / 3), averaged over questions, and their number.

    As the official ``eval_predictions.py`` (allenai/aokvqa, Apache-2.0) computes it: letter by letter, with no
    normalisation and no annotator left out; so a capital or a full stop is another answer. ``vqa_accuracy`` is milder
    there, and gives an answer of one annotator in ten 0.3 where this gives 0.333.
    """

    of_answers = ACCURACY

    def __init__(self) -> None:
        self._scores: list[float] = []

    def score(self, prediction: Row) -> float:
        """Of one answer, 0..1; UserError if the question has no reference."""
        if not prediction.references:
            raise UserError(f"Question {prediction.id} of {prediction.benchmark} has no answer; give it one.")
        return min(1.0, sum(prediction.prediction == text for text in prediction.references) / 3)

    def update(self, prediction: Row) -> None:
        """Add one answered question."""
        self._scores.append(self.score(prediction))

    def predicted(self) -> dict[str, float]:
        """The mean; UserError if there was no question."""
        if not self._scores:
            raise UserError("DirectAnswer has no question to score; raise budget.eval_limit or check the benchmark.")
        return {ACCURACY: fmean(self._scores)}

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the number of questions; floors are scored beside it and change nothing here."""
        return self.predicted() | {f"{ACCURACY}/count": float(len(self._scores))}

"""Token F1 of free answers: how many words an answer shares with the right one (SQuAD's measure, arXiv 1606.05250).

Words are compared after the VQA evaluator's normalisation, as ``vqa_accuracy`` compares whole answers, so that both
are on one ground; SQuAD's own leaves number words and contractions as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import fmean

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.metrics.vqa import emptied, normalise, refuse_emptied

F1 = "token_f1"


def token_f1(prediction: str, references: Iterable[str]) -> float:
    """The best F1 over the references, 0..1; two empty answers agree."""
    return max((_one(normalise(prediction).split(), normalise(text).split()) for text in references), default=0.0)


def _one(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))


class TokenF1:
    """``token_f1``: the mean over all questions, also per kind as ``token_f1/kind/<kind>``, and their number.

    Published PathVQA results give it for open questions, and plain accuracy for those of yes or no; both are in the
    rows of their kinds.
    """

    of_answers = F1
    loses = staticmethod(emptied)

    def __init__(self) -> None:
        self._scores: dict[str, list[float]] = {"": []}

    def score(self, prediction: Row) -> float:
        """F1 of one answer, 0..1; UserError if the question has no reference, or an option that is an article."""
        refuse_emptied(prediction)
        if not prediction.references:
            raise UserError(f"Question {prediction.id} of {prediction.benchmark} has no answer; give it one.")
        return token_f1(prediction.prediction, prediction.references)

    def update(self, prediction: Row) -> None:
        """Add one answered question."""
        for suffix in ("", f"/kind/{prediction.kind}") if prediction.kind else ("",):
            self._scores.setdefault(suffix, []).append(self.score(prediction))

    def predicted(self) -> dict[str, float]:
        """The mean, overall and per kind; UserError if there was no question."""
        if not self._scores[""]:
            raise UserError("TokenF1 has no question to score; raise budget.eval_limit or check the benchmark.")
        return {f"{F1}{suffix}": fmean(values) for suffix, values in sorted(self._scores.items())}

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the number of questions; floors are scored beside it and change nothing here."""
        return self.predicted() | {f"{F1}/count": float(len(self._scores[""]))}

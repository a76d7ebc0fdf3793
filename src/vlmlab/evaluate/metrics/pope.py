"""POPE's scores of yes-or-no questions about objects (arXiv 2305.10355).

As the official ``evaluate.py`` (AoiDragon/POPE, MIT) computes them; two files of published answers give its numbers to
every digit. Its reading of an answer is crude: whatever does not say "no" in the first sentence counts as yes, so that
an empty or unrelated answer is a yes. ``yes_ratio`` and the baselines with wrong images show where that decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.rows import Row

NAMES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def says_yes(answer: str) -> bool:
    """As the evaluator reads it: no if "No", "no" or "not" is a word before the first full stop, else yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


class Pope:
    """``pope_accuracy``, ``pope_precision``, ``pope_recall``, ``pope_f1``, ``pope_yes_ratio``; yes is positive.

    Each also per kind as ``<name>/kind/<kind>``, and ``pope_accuracy/count``, the number of questions.
    """

    of_answers = "pope_accuracy"

    def __init__(self) -> None:
        self._counts: dict[str, Counter[tuple[bool, bool]]] = {"": Counter()}

    def score(self, prediction: Row) -> float:
        """1.0 where yes or no is right; UserError where the reference is neither."""
        return float(says_yes(prediction.prediction) == self._label(prediction))

    def update(self, prediction: Row) -> None:
        """Add one answered question."""
        pair = (self._label(prediction), says_yes(prediction.prediction))
        for suffix in ("", f"/kind/{prediction.kind}") if prediction.kind else ("",):
            self._counts.setdefault(suffix, Counter())[pair] += 1

    def _label(self, row: Row) -> bool:
        reference = row.references[0].strip().lower() if row.references else ""
        if reference not in ("yes", "no"):
            raise UserError(
                f"Question {row.id} of {row.benchmark} has the answer {reference!r}, and POPE's are yes or no; use "
                "another metric."
            )
        return reference == "yes"

    def predicted(self) -> dict[str, float]:
        """All scores, overall and per kind; UserError if there was no question."""
        if not self._counts[""]:
            raise UserError("Pope has no question to score; raise budget.eval_limit or check the benchmark.")
        return {
            f"pope_{name}{suffix}": value
            for suffix, counts in sorted(self._counts.items())
            for name, value in zip(NAMES, _scores(counts), strict=True)
        }

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the number of questions; floors are scored beside it and change nothing here."""
        return self.predicted() | {"pope_accuracy/count": float(self._counts[""].total())}


def _scores(counts: Counter[tuple[bool, bool]]) -> tuple[float, ...]:
    """The five scores; precision, recall and F1 are 0 where nothing is yes."""
    hits, misses, alarms = counts[True, True], counts[True, False], counts[False, True]
    total = counts.total()
    precision = hits / (hits + alarms) if hits + alarms else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return (hits + counts[False, False]) / total, precision, recall, f1, (hits + alarms) / total

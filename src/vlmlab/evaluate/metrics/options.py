"""Accuracy of answers chosen from options, by likelihood or in words.

``acc`` and ``acc_norm`` of lm-evaluation-harness and lmms-eval for multiple choice: the option with the highest sum of
log-probabilities, and the one whose sum is highest over its number of characters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.floors import above
from vlmlab.evaluate.metrics.rows import Row

ACCURACY, NORMALISED = "option_accuracy", "option_accuracy_norm"
AROUND = " \n\t.()"


def chosen(row: Row) -> str:
    """The option that was chosen: the likeliest, or else the one that the answer says; empty where it says none."""
    if row.log_likelihoods:
        return row.options[_highest(row.log_likelihoods)]
    said = row.prediction.strip(AROUND).lower()
    return next((option for option in row.options if option.strip(AROUND).lower() == said), "")


def chosen_by_length(row: Row) -> str:
    """The option with the highest log-likelihood over its number of characters; `chosen` where there is none."""
    if not row.log_likelihoods:
        return chosen(row)
    each = zip(row.log_likelihoods, row.options, strict=True)
    return row.options[_highest([log / len(option) for log, option in each])]


def _highest(values: tuple[float, ...] | list[float]) -> int:
    """The first of the highest."""
    return max(range(len(values)), key=lambda i: values[i])


class OptionAccuracy:
    """``option_accuracy`` (acc), ``option_accuracy_norm`` (acc_norm), each also per kind and per group.

    Also ``option_accuracy/count``, ``chance`` (what a question states, or else one over its options) and
    ``normalised`` = (accuracy - floor) / (1 - floor) with the floor's own name and height, overall, as ``vqa_accuracy``
    has them. Of answers in words (``scoring: generate``, the lookup) both are the share that names the right option,
    case, brackets and a full stop apart.
    """

    of_answers = ACCURACY

    def __init__(self) -> None:
        self._right: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._chance: list[float] = []

    def score(self, prediction: Row) -> float:
        """1.0 where the option of the highest likelihood is right.

        Raises:
            UserError: the question has no options, or its answer is none of them.
        """
        return float(chosen(prediction) in self._references(prediction))

    def update(self, prediction: Row) -> None:
        """Add one answered question."""
        right = self.score(prediction), float(chosen_by_length(prediction) in self._references(prediction))
        kinds = [f"/kind/{prediction.kind}"] if prediction.kind else []
        groups = [f"/{prediction.group}"] if prediction.group else []
        for suffix in ("", *kinds, *groups):
            self._right[suffix].append(right)
        self._chance.append(1 / len(prediction.options) if prediction.chance is None else prediction.chance)

    def _references(self, row: Row) -> set[str]:
        if not row.options:
            raise UserError(
                f"Question {row.id} of {row.benchmark} has no options; use another metric, or give it some by "
                "vlmlab.data.options.ClosedAnswers."
            )
        right = {*row.references} & {*row.options}
        if not right:
            raise UserError(f"The answer of question {row.id} of {row.benchmark} is none of its options; correct it.")
        return right

    def predicted(self) -> dict[str, float]:
        """Both accuracies; UserError if there was no question."""
        if not self._right:
            raise UserError("OptionAccuracy has no question to score; raise budget.eval_limit or check the benchmark.")
        return {
            f"{name}{suffix}": fmean(pair[k] for pair in pairs)
            for suffix, pairs in sorted(self._right.items())
            for k, name in enumerate((ACCURACY, NORMALISED))
        }

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the number of questions, the chance level and the share above the highest floor."""
        result = self.predicted()
        known = {name: scores[ACCURACY] for name, scores in (floors or {}).items() if ACCURACY in scores}
        chance = fmean(self._chance)
        result |= {f"{ACCURACY}/count": float(len(self._chance)), "chance": chance}
        return result | above(result[ACCURACY], {"chance": chance, **known})

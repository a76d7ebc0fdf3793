"""How much a score depends on the wording of the instruction (MultiInstruct, arXiv 2212.10773, section 4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, pstdev

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import AnswerMetric
from vlmlab.evaluate.metrics.rows import Row

SENSITIVITY = "sensitivity"


class Sensitivity:
    """``sensitivity``: the mean over tasks of the standard deviation over the mean of the score across wordings.

    A task is a kind of question, and also has its own ``sensitivity/kind/<kind>``; a wording is a question's group, see
    ``vlmlab.data.wordings.Wordings``. Lower is steadier, 0 is the same score in every wording. The deviation is that of
    the wordings themselves (divided by their number [dflt], which the paper leaves open). A task whose score is 0 in
    every wording has none and is left out; ``sensitivity/tasks`` says how many are in the mean.

    Args:
        metric: scores single answers, as ``vlmlab.evaluate.metrics.vqa.VqaAccuracy``.

    Raises:
        UserError: it scores no single answers.
    """

    def __init__(self, metric: AnswerMetric) -> None:
        if not isinstance(metric, AnswerMetric):
            raise UserError(f"Sensitivity: {type(metric).__name__} scores no single answers; give VqaAccuracy, say.")
        self.metric = metric
        self._scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def update(self, prediction: Row) -> None:
        """Add one answered question; UserError if it has no wording."""
        if not prediction.group:
            raise UserError(
                f"Question {prediction.id} of {prediction.benchmark} is in no named wording; ask by "
                "vlmlab.data.wordings.Wordings, or take Sensitivity out of the metrics."
            )
        self._scores[prediction.kind][prediction.group].append(self.metric.score(prediction))

    def predicted(self) -> dict[str, float]:
        """Overall and per task; UserError if there was no question, or a task in one wording alone."""
        if not self._scores:
            raise UserError("Sensitivity has no question to score; raise budget.eval_limit or check the benchmark.")
        each = {kind: _of(kind, wordings) for kind, wordings in sorted(self._scores.items())}
        known = {kind: value for kind, value in each.items() if value is not None}
        overall = {SENSITIVITY: fmean(known.values())} if known else {}
        return overall | {f"{SENSITIVITY}/kind/{kind}": value for kind, value in known.items() if kind}

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """The same with the numbers of answers, of tasks in the mean, and of wordings; floors change nothing."""
        result = self.predicted()
        answers = [scores for wordings in self._scores.values() for scores in wordings.values()]
        names = {name for wordings in self._scores.values() for name in wordings}
        tasks = sum(_of(kind, wordings) is not None for kind, wordings in self._scores.items())
        counts = {"count": sum(map(len, answers)), "tasks": tasks, "wordings": len(names)}
        return result | {f"{SENSITIVITY}/{name}": float(count) for name, count in counts.items()}


def _of(kind: str, wordings: Mapping[str, list[float]]) -> float | None:
    """One task's; None where every score is 0."""
    if len(wordings) < 2:
        raise UserError(f"Sensitivity: questions of kind {kind!r} are in one wording; raise budget.eval_limit.")
    means = [fmean(scores) for scores in wordings.values()]
    return pstdev(means) / fmean(means) if any(means) else None

"""The score of every single answer of a run, from its prediction files, and the image each question is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmlab.analyse.questions import Indices, numbered, share_over_questions
from vlmlab.analyse.results import MetricKey
from vlmlab.analyse.stats import Interval, Numbers
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import AnswerMetric
from vlmlab.evaluate.metrics.rows import Row, read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.runs.folder import RunFolder

Question = tuple[str, int]
"""Id of the sample and index of the turn."""


@dataclass(frozen=True)
class Scored:
    """The answers of one run to one benchmark, each with its score.

    Attributes:
        name: of the score that is the mean of these.
        scores: of each question.
        images: names of the images that each question was asked with; its sample's id where it has none.
        rows: as they are in the file.
    """

    name: str
    scores: Mapping[Question, float]
    images: Mapping[Question, tuple[str, ...]]
    rows: Mapping[Question, Row]

    def questions(self, key: MetricKey) -> list[Question]:
        """The questions that a metric of this benchmark is the mean of; none if it is not such a mean."""
        if not f"{key.score}/".startswith(f"{self.name}/"):
            return []
        group = key.score.removeprefix(self.name).lstrip("/")
        of_kind = [one for one, row in self.rows.items() if not key.kind or row.kind == key.kind]
        return [one for one in of_kind if not group or self.rows[one].group == group]


def scored(folder: Path, benchmark: str, baseline: str = "", config: Mapping[str, Any] | None = None) -> Scored | None:
    """The answers of a run to a benchmark; None where they are not there, or no metric scores single answers.

    Args:
        folder: with the predictions.
        benchmark: its name.
        baseline: which set of answers, as for `predictions_file`.
        config: the plain configuration with the benchmark's metrics; None: that of the run whose folder this is.

    Raises:
        DataError: a line of the predictions cannot be used.
    """
    path = predictions_file(folder, benchmark, baseline)
    metric = _answer_metric(config or RunFolder(folder).config() or {}, benchmark) if path.is_file() else None
    if metric is None:
        return None
    rows = {(row.id, row.turn): row for row in read_rows(path)}
    images = {key: row.image_ids or (row.id,) for key, row in rows.items()}
    return Scored(metric.of_answers, {key: metric.score(row) for key, row in rows.items()}, images, rows)


def _answer_metric(config: Mapping[str, Any], benchmark: str) -> AnswerMetric | None:
    """The run's metric of this benchmark that scores single answers; None where it has none."""
    from hydra.utils import instantiate

    benchmarks = (config.get("data") or {}).get("benchmarks") or {}
    made = map(instantiate, (benchmarks.get(benchmark) or {}).get("metrics") or [])
    return next((metric for metric in made if isinstance(metric, AnswerMetric)), None)


def intervals_over_questions(
    folder: Path, metrics: Iterable[str], config: Mapping[str, Any] | None = None
) -> dict[str, Interval]:
    """Intervals over questions, clustered by image, of the metrics of one run that are means over its answers.

    They describe this one trained model. Predictions that cannot be read give none: the table of a result comes
    whatever became of them. Arguments as for `scored`.
    """
    keys = [key for key in map(MetricKey.parse, metrics) if not key.baseline]
    found: dict[str, Interval] = {}
    for benchmark in dict.fromkeys(key.benchmark for key in keys):
        try:
            answers = scored(folder, benchmark, config=config)
        except UserError:
            continue
        for key in keys if answers is not None else ():
            if key.benchmark == benchmark and answers is not None and (chosen := answers.questions(key)):
                images = numbered([answers.images[one] for one in chosen])
                found[str(key)] = share_over_questions([answers.scores[one] for one in chosen], images)
    return found


def aligned(runs: Sequence[Scored], key: MetricKey) -> tuple[Numbers, Indices]:
    """Scores (S, N) of runs on the questions of a metric that all were asked, and the numbers (N,) of their images."""
    common = [one for one in runs[0].questions(key) if all(one in run.scores for run in runs[1:])]
    scores = np.array([[run.scores[one] for one in common] for run in runs], dtype=np.float64)
    return scores, numbered([runs[0].images[one] for one in common])

"""From prediction files to the ``metrics`` of ``result.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from vlmlab.contracts.errors import UserError, brief
from vlmlab.contracts.sample import Metric
from vlmlab.evaluate.metrics.rows import Row, read_rows
from vlmlab.runs.names import is_plain_name

BASELINES = ("shuffled", "no_image")
"""Evaluations of the same trained model beside the real one: with another sample's images, and with none."""
LOOKUP = "lookup"
"""The commonest training answers (`vlmlab.evaluate.lookup`) as one more set of answers to the same questions."""
FLOORS = (*BASELINES, LOOKUP)
"""Sets of answers that are scored beside the real one, each by the same metric: what comes without looking."""
PROBE = "probe"
"""What untrained towers answer through a fitted map (`vlmlab.evaluate.probe`): it looks, and is not a floor."""
BESIDE = (*FLOORS, PROBE)
"""All sets of answers that are beside the real one."""


def predictions_file(folder: Path, benchmark: str, baseline: str = "") -> Path:
    """Where a run keeps the predictions of a benchmark.

    Raises:
        UserError: its name would lie elsewhere.
    """
    if not is_plain_name(benchmark):
        raise UserError(
            f"{brief(benchmark, 60)!r} cannot name a benchmark, since no file can have that name; rename it."
        )
    return folder / "predictions" / (f"{benchmark}.{baseline}.jsonl" if baseline else f"{benchmark}.jsonl")


def score_rows(
    rows: Iterable[Row], metrics: Sequence[Callable[[], Metric]], benchmark: str, baseline: str = ""
) -> dict[str, float]:
    """Scores of one prediction set, keyed ``<benchmark>/<score>[/<baseline>]``.

    Args:
        rows: all rows of the set.
        metrics: makers of fresh metrics (classes, or partial instantiations from the configuration).
        benchmark: the benchmark's name, the first part of every key.
        baseline: one of `BESIDE`, or empty for the real evaluation.
    """
    scores: dict[str, float] = {}
    for metric in _updated(rows, metrics):
        scores |= _keyed(metric.predicted() if baseline else metric.compute(), benchmark, baseline)
    return scores


def score_predictions(
    folder: Path, benchmark: str, metrics: Sequence[Callable[[], Metric]], baselines: Sequence[str] = BESIDE
) -> dict[str, float]:
    """Scores of a run's benchmark with what is beside them, recomputed from the prediction files that are there.

    Args:
        folder: the run's folder.
        benchmark: the benchmark's name.
        metrics: makers of fresh metrics.
        baselines: those whose predictions exist are scored too; `FLOORS` count as floors of the real evaluation.

    Raises:
        DataError: the benchmark's own predictions are missing, or a line of a file cannot be used.
    """
    made = _updated(read_rows(predictions_file(folder, benchmark)), metrics)
    paths = {baseline: predictions_file(folder, benchmark, baseline) for baseline in baselines}
    beside = {name: _updated(read_rows(path), metrics) for name, path in paths.items() if path.is_file()}
    scores: dict[str, float] = {}
    for index, metric in enumerate(made):
        others = {name: metrics_of[index].predicted() for name, metrics_of in beside.items()}
        floors = {name: values for name, values in others.items() if name in FLOORS}
        scores |= _keyed(metric.compute(floors), benchmark)
        for name, values in others.items():
            scores |= _keyed(values, benchmark, name)
    return scores


def lost_answers(folder: Path, benchmark: str, metrics: Sequence[Callable[[], Metric]]) -> list[str]:
    """A sentence for each metric that reads right answers of a benchmark as empty, and scores an empty answer as right.

    Args:
        folder: the run's folder.
        benchmark: the benchmark's name.
        metrics: makers of fresh metrics.

    Raises:
        DataError: the benchmark's own predictions are missing, or a line of a file cannot be used.
    """
    rows = read_rows(predictions_file(folder, benchmark))
    notes = []
    for metric in (make() for make in metrics):
        loses = getattr(metric, "loses", None)
        lost = [text for row in rows for text in row.references[:1] if loses is not None and loses(text)]
        if lost:
            notes.append(
                f"{benchmark}: {type(metric).__name__} leaves nothing of the right answer of {len(lost)} of "
                f"{len(rows)} questions (as of {brief(lost[0], 20)!r}: it drops articles and marks), so that an empty "
                "answer is right"
            )
    return notes


def _updated(rows: Iterable[Row], metrics: Sequence[Callable[[], Metric]]) -> list[Metric]:
    """Fresh metrics that have seen the rows."""
    made = [make() for make in metrics]
    for row in rows:
        for metric in made:
            metric.update(row)
    return made


def _keyed(values: Mapping[str, float], benchmark: str, baseline: str = "") -> dict[str, float]:
    suffix = f"/{baseline}" if baseline else ""
    return {f"{benchmark}/{name}{suffix}": value for name, value in values.items()}

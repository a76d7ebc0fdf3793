"""From prediction files to the ``metrics`` of ``result.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vlmlab.contracts.sample import Metric
from vlmlab.evaluate.metrics.rows import Row, read_rows

BASELINES = ("shuffled", "no_image")
"""Evaluations of the same trained model beside the real one: with another sample's images, and with none."""


def predictions_file(folder: Path, benchmark: str, baseline: str = "") -> Path:
    """Where a run keeps the predictions of a benchmark."""
    return folder / "predictions" / (f"{benchmark}.{baseline}.jsonl" if baseline else f"{benchmark}.jsonl")


def score_rows(
    rows: Iterable[Row], metrics: Sequence[Callable[[], Metric]], benchmark: str, baseline: str = ""
) -> dict[str, float]:
    """Scores of one prediction set, keyed ``<benchmark>/<score>[/<baseline>]``.

    Args:
        rows: all rows of the set.
        metrics: makers of fresh metrics (classes, or partial instantiations from the configuration).
        benchmark: the benchmark's name, the first part of every key.
        baseline: one of `BASELINES`, or empty for the real evaluation.
    """
    made = [make() for make in metrics]
    for row in rows:
        for metric in made:
            metric.update(row)
    suffix = f"/{baseline}" if baseline else ""
    scores: dict[str, float] = {}
    for metric in made:
        values = metric.predicted() if baseline else metric.compute()
        scores |= {f"{benchmark}/{name}{suffix}": value for name, value in values.items()}
    return scores


def score_predictions(
    folder: Path, benchmark: str, metrics: Sequence[Callable[[], Metric]], baselines: Sequence[str] = BASELINES
) -> dict[str, float]:
    """Scores of a run's benchmark with its baselines, recomputed from the prediction files that are there.

    Args:
        folder: the run's folder.
        benchmark: the benchmark's name.
        metrics: makers of fresh metrics.
        baselines: those of them whose predictions exist are scored too.

    Raises:
        DataError: the benchmark's own predictions are missing, or a line of a file cannot be used.
    """
    scores = score_rows(read_rows(predictions_file(folder, benchmark)), metrics, benchmark)
    for baseline in baselines:
        path = predictions_file(folder, benchmark, baseline)
        if path.is_file():
            scores |= score_rows(read_rows(path), metrics, benchmark, baseline)
    return scores

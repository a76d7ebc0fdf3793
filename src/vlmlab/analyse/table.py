"""The final table of one run: every accuracy with its chance level, its baselines and its cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmlab.analyse.results import MetricKey, numbers
from vlmlab.analyse.text import plain_table, short_number
from vlmlab.evaluate.metrics.scoring import BASELINES

BESIDE = ("chance", "normalised")
"""Scores that stand in a column beside the accuracy they belong to."""
HUMAN = "human/"


@dataclass(frozen=True)
class BenchmarkTable:
    """The scores of one benchmark, ready to print.

    Attributes:
        name: the benchmark.
        count: number of items, None where unknown.
        columns: titles; the first is the score's.
        rows: the score's name (of a kind: the kind, indented), then one number or None per column.
    """

    name: str
    count: int | None
    columns: tuple[str, ...]
    rows: list[tuple[str, tuple[float | None, ...]]]


def benchmark_tables(metrics: Mapping[str, float]) -> list[BenchmarkTable]:
    """One table per benchmark, in the order in which they stand in ``result.json``."""
    grouped: dict[str, dict[MetricKey, float]] = defaultdict(dict)
    for name, value in metrics.items():
        key = MetricKey.parse(name)
        grouped[key.benchmark][key] = value
    return [_benchmark_table(name, values) for name, values in grouped.items()]


def _benchmark_table(name: str, values: Mapping[MetricKey, float]) -> BenchmarkTable:
    counts = [value for key, value in values.items() if key.score.split("/")[-1] == "count"]
    cells: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    accuracy = _accuracy(values)
    for key, value in values.items():
        if key.score.split("/")[-1] == "count":
            continue
        if key.score in BESIDE and accuracy:
            cells[accuracy, key.kind][key.score] = value
        elif key.score.startswith(HUMAN):
            cells[key.score.removeprefix(HUMAN), key.kind]["human"] = value
        else:
            cells[key.score, key.kind][key.baseline or "value"] = value
    for row in cells.values():
        if "human" in row and "value" in row and row["human"] > 0:
            row["of human"] = row["value"] / row["human"]
    order = ("value", *BASELINES, *BESIDE, "human", "of human")
    columns = tuple(title for title in order if any(title in row for row in cells.values()))
    ranked = sorted(cells, key=lambda cell: (_first(cells, cell[0]), cell[1] != "", cell[1]))
    rows = [
        (f"  {kind}" if kind else score, tuple(cells[score, kind].get(title) for title in columns))
        for score, kind in ranked
    ]
    return BenchmarkTable(name, int(counts[0]) if counts else None, ("score", *columns), rows)


def _accuracy(values: Mapping[MetricKey, float]) -> str:
    """The score that chance levels belong to: the one that is given per kind like them, or simply the first."""
    others = [key for key in values if key.score not in BESIDE and not key.score.startswith(HUMAN)]
    per_kind = [key.score for key in others if key.kind]
    return (per_kind or [key.score for key in others] or [""])[0]


def _first(cells: Mapping[tuple[str, str], Any], score: str) -> int:
    return [name for name, _ in cells].index(score)


def final_table(result: Mapping[str, Any]) -> str:
    """The text to print at the end of a run, at most 120 columns wide.

    Args:
        result: the contents of ``result.json``.
    """
    lines: list[str] = []
    for table in benchmark_tables(numbers(result.get("metrics"))):
        count = "" if table.count is None else f" ({table.count} items)"
        rows = [[name, *("" if value is None else f"{value:.3f}" for value in values)] for name, values in table.rows]
        body = plain_table(table.columns, rows)
        lines += [f"{table.name}{count}", *(f"  {line}".rstrip() for line in body), ""]
    if not lines:
        lines = ["no metrics", ""]
    return "\n".join([*lines, *_cost_lines(result)])


def _cost_lines(result: Mapping[str, Any]) -> list[str]:
    cost = numbers(result.get("cost"))
    parts = [f"{name} {short_number(value)}" for name, value in cost.items()]
    return [f"cost  {', '.join(parts)}"] if parts else []

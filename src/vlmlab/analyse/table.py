"""The final table of one run: every accuracy with its floors, the highest of them, its ceiling and its cost."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmlab.analyse.results import FLOOR, MetricKey, numbers
from vlmlab.analyse.text import plain_table, short_number, terminal_width
from vlmlab.evaluate.metrics.captions import CEILINGS, LEFT_OUT
from vlmlab.evaluate.metrics.scoring import BESIDE as SETS

if TYPE_CHECKING:
    from vlmlab.analyse.stats import Interval

BESIDE = ("chance", "normalised")
"""Scores shown in a column beside the accuracy they belong to."""
INTERVAL = "95 % interval"
"""The column of the interval over questions."""
OF_ONE_MODEL = (
    "95 % interval: over questions, those about one image taken as one; it describes this one trained model and not "
    "another seed."
)
OVER = "over"
"""The column that names the floor which ``normalised`` is over."""

Cell = float | str | None


@dataclass(frozen=True)
class BenchmarkTable:
    """The scores of one benchmark, ready to print.

    Attributes:
        name: the benchmark.
        count: number of items, None where unknown.
        columns: titles; the first is the score's.
        rows: the score's name (of a kind or group: that, indented), then one number, word or None per column.
    """

    name: str
    count: int | None
    columns: tuple[str, ...]
    rows: list[tuple[str, tuple[Cell, ...]]]


def benchmark_tables(
    metrics: Mapping[str, float], intervals: Mapping[str, Interval] | None = None
) -> list[BenchmarkTable]:
    """One table per benchmark, in the order of ``result.json``.

    Args:
        metrics: of ``result.json``.
        intervals: over questions, of those metrics that have one.
    """
    grouped: dict[str, dict[MetricKey, float]] = defaultdict(dict)
    for name, value in metrics.items():
        key = MetricKey.parse(name)
        grouped[key.benchmark][key] = value
    return [_benchmark_table(name, values, intervals or {}) for name, values in grouped.items()]


def _benchmark_table(name: str, values: Mapping[MetricKey, float], intervals: Mapping[str, Interval]) -> BenchmarkTable:
    cells: dict[tuple[str, str], dict[str, Cell]] = defaultdict(dict)
    counts: dict[str, float] = {}
    accuracy, scores = _accuracy(values), {key.score for key in values}
    for key, value in values.items():
        if is_count(key):
            counts[key.score.partition("/")[2].removesuffix("count").rstrip("/")] = value
        else:
            score, part, title, cell = _place(key, value, accuracy, scores)
            cells[score, part][title] = cell
            interval = intervals.get(str(key))
            if interval is not None and interval.low is not None and interval.high is not None:  # scores are shares
                cells[score, part][INTERVAL] = f"{max(interval.low, 0.0):.3f}-{min(interval.high, 1.0):.3f}"
    ceilings: list[str] = []
    for who in CEILINGS.values():
        ceilings += [who, f"of {who}"]
        for row in cells.values():
            own, theirs = row.get(LEFT_OUT), row.get(who)
            if isinstance(own, float) and isinstance(theirs, float) and theirs > 0:
                row[f"of {who}"] = own / theirs
    order = ("value", INTERVAL, *SETS, *BESIDE, OVER, LEFT_OUT, *ceilings)
    columns = tuple(title for title in order if any(title in row for row in cells.values()))
    ranked = sorted(cells, key=lambda cell: (_first(cells, cell[0]), cell[1] != "", cell[1] in counts, cell[1]))
    rows = [
        (_label(score, part, counts), tuple(cells[score, part].get(title) for title in columns))
        for score, part in ranked
    ]
    return BenchmarkTable(name, int(counts[""]) if "" in counts else None, ("score", *columns), rows)


def is_count(key: MetricKey) -> bool:
    """Whether this is a number of items and no score."""
    return key.score.split("/")[-1] == "count"


def is_level(key: MetricKey) -> bool:
    """Whether this describes another score: chance, floors, ceilings, what compares with a ceiling."""
    first, *rest = key.score.split("/")
    return first in (*BESIDE, FLOOR, *CEILINGS.values()) or LEFT_OUT in rest


def _place(key: MetricKey, value: float, accuracy: str, scores: Collection[str]) -> tuple[str, str, str, Cell]:
    """A cell of a table: the score of its row, the kind or group, the title of its column; and what is shown."""
    first, _, rest = key.score.partition("/")
    if first == FLOOR:
        floor, _, group = rest.partition("/")
        return accuracy, key.kind or group, OVER, floor
    if first in BESIDE and accuracy:
        return accuracy, key.kind or rest, first, value
    if first in CEILINGS.values():
        return rest, key.kind, first, value
    if rest == LEFT_OUT:
        return first, key.kind, rest, value
    if rest and first in scores:
        return first, rest, key.baseline or "value", value
    return key.score, key.kind, key.baseline or "value", value


def _label(score: str, part: str, counts: Mapping[str, float]) -> str:
    """A row's name; a group's with its number of items, which a kind does not have."""
    if not part:
        return score
    return f"  {part} ({counts[part]:.0f})" if part in counts else f"  {part}"


def _accuracy(values: Mapping[MetricKey, float]) -> str:
    """The score that chance levels belong to: the one that is given per kind like them, or simply the first."""
    others = [key for key in values if not is_level(key)]
    per_kind = [key.score for key in others if key.kind]
    return (per_kind or [key.score for key in others] or [""])[0]


def _first(cells: Mapping[tuple[str, str], Any], score: str) -> int:
    return [name for name, _ in cells].index(score)


def shown(value: Cell) -> str:
    """A cell as text: a number with three decimals, a word as it is."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def final_table(result: Mapping[str, Any], folder: Path | None = None, config: Mapping[str, Any] | None = None) -> str:
    """The text to print at the end of a run, as wide as the terminal, from 80 to 120 columns.

    Args:
        result: the contents of ``result.json``.
        folder: whose predictions give the intervals over questions; None: no intervals.
        config: the plain configuration of the run; None: the folder is the run's and has it.
    """
    lines: list[str] = []
    metrics = numbers(result.get("metrics"))
    intervals = _intervals(folder, metrics, config)
    for table in benchmark_tables(metrics, intervals):
        count = "" if table.count is None else f" ({table.count} items)"
        rows = [[name, *map(shown, values)] for name, values in table.rows]
        body = plain_table(table.columns, rows)
        lines += [f"{table.name}{count}", *(f"  {line}".rstrip() for line in body), ""]
    if not lines:
        lines = ["no metrics", ""]
    if intervals:
        lines += [*textwrap.wrap(OF_ONE_MODEL, terminal_width(), subsequent_indent="  "), ""]
    return "\n".join([*lines, *_cost_lines(result), *_note_lines(result)])


def _intervals(
    folder: Path | None, metrics: Mapping[str, float], config: Mapping[str, Any] | None
) -> dict[str, Interval]:
    if folder is None or not metrics:
        return {}
    from vlmlab.analyse.answers import intervals_over_questions  # numpy and scipy, which no other table needs

    return intervals_over_questions(folder, metrics, config)


def _note_lines(result: Mapping[str, Any]) -> list[str]:
    notes = result.get("notes")
    found = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return [line for note in found for line in textwrap.wrap(f"note: {note}", terminal_width(), subsequent_indent="  ")]


def _cost_lines(result: Mapping[str, Any]) -> list[str]:
    cost = numbers(result.get("cost"))
    parts = [f"{name} {short_number(value)}" for name, value in cost.items()]
    return [f"cost  {', '.join(parts)}"] if parts else []

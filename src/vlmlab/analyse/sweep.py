"""The table of a sweep: one row per combination of swept keys, mean and interval over seeds, whatever failed."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vlmlab.analyse.combination import Combination, combinations, short_names
from vlmlab.analyse.compare import Comparison, compare, reach
from vlmlab.analyse.results import FIRST, MetricKey, RunRecord, failed_run, read_sweep
from vlmlab.analyse.table import is_count, is_level
from vlmlab.analyse.text import markdown_table, plain_table, short_number, terminal_width
from vlmlab.evaluate.metrics.scoring import LOOKUP
from vlmlab.runs.files import write_atomic
from vlmlab.runs.shared import sharing_note

COST_FIRST = (
    "params", "added", "trainable", "visual_tokens", "flops_sample", "flops_token", "cache_bytes", "seconds"
)  # fmt: skip
SHOWN_FAILURES = 20


def main_metrics(records: Sequence[RunRecord]) -> list[str]:
    """The overall scores that all finished cells have, the most telling ones first.

    A score counts where it has a shuffled baseline; where no benchmark has one, every overall score.
    """
    finished = [record.metrics for record in records if record.done]
    common = [name for name in (finished[0] if finished else {}) if all(name in metrics for metrics in finished)]
    overall = [name for name in common if _is_overall(MetricKey.parse(name), common)]
    with_baseline = [name for name in overall if f"{name}/shuffled" in common]
    return sorted(with_baseline or overall, key=lambda name: MetricKey.parse(name).score not in FIRST)


def _is_overall(key: MetricKey, names: Sequence[str]) -> bool:
    """Whether this is a score of a whole benchmark, not of a kind, and not of a group beside its whole."""
    whole = f"{key.benchmark}/{key.score.rpartition('/')[0]}"
    return not (is_level(key) or is_count(key) or key.kind or key.baseline or whole in names)


def write_table(sweep_dir: Path, failed: Iterable[tuple[Path, Iterable[str], str]] = ()) -> str:
    """Write ``table.csv``, ``table.md`` and ``figure.png`` into a sweep's folder and return the table as text.

    The text is as wide as the terminal, from 80 to 120 columns.

    Comes whatever is missing: a cell that failed, runs or has a broken ``result.json`` is a row that says so, and a
    figure that cannot be drawn is a line that says why.

    Args:
        sweep_dir: the sweep's folder.
        failed: folder, overrides and reason of cells that have failed, as their launcher knows; a folder may be gone.
    """
    found = {record.folder: record for record in read_sweep(sweep_dir)}
    for folder, overrides, reason in failed:
        if folder not in found or found[folder].state != "failed":
            found[folder] = failed_run(folder, overrides, reason)
    records = [found[folder] for folder in sorted(found)]
    if not records:
        return f"{sweep_dir} holds no cell"
    rows = combinations(records)
    metrics = main_metrics(records)
    write_atomic(sweep_dir / "table.csv", to_csv(rows))
    write_atomic(sweep_dir / "table.md", to_markdown(rows, metrics))
    lines = [*_heading(sweep_dir, records), "", *_table(rows, _score_columns(rows, metrics))]
    lines += (
        _cost_table(rows)
        + _difference_table(sweep_dir, rows, metrics)
        + _failures(records)
        + _notes(rows, sharing_note(sweep_dir))
    )
    return "\n".join([*lines, "", f"{sweep_dir / 'table.csv'}  {_figure(sweep_dir, rows, metrics)}"])


def to_csv(rows: Sequence[Combination]) -> str:
    """Every metric and cost of every combination; intervals as low and high, empty where there is none."""
    names = list(dict.fromkeys(name for row in rows for record in row.finished for name in record.metrics))
    costs = list(dict.fromkeys(name for row in rows for record in row.finished for name in record.cost))
    keys = list(rows[0].values) if rows else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = [title for name in names for title in (name, f"{name}/low", f"{name}/high")]
    writer.writerow([*keys, "n", "state", "reason", "stale", *titles, *(f"cost/{name}" for name in costs)])
    for row in rows:
        reasons = "; ".join(dict.fromkeys(record.reason for record in row.records if record.reason))
        stale = sum(record.stale for record in row.records)
        intervals = [row.interval(name) for name in names]
        values = [value for i in intervals for value in ((i.mean, i.low, i.high) if i else (None, None, None))]
        writer.writerow(
            [*row.values.values(), len(row.finished), row.state.replace("*", ""), reasons, stale]
            + ["" if value is None else repr(value) for value in [*values, *(row.cost(name) for name in costs)]]
        )
    return out.getvalue()


def _heading(sweep_dir: Path, records: Sequence[RunRecord]) -> list[str]:
    states = [record.state for record in records]
    counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    shared = {
        key: value
        for key, value in records[0].overrides.items()
        if all(record.overrides.get(key) == value for record in records)
    }
    lines = [f"Sweep {sweep_dir}: {len(records)} cells: {counted}"]
    return lines + ([f"everywhere: {' '.join(f'{key}={value}' for key, value in shared.items())}"] if shared else [])


def to_markdown(rows: Sequence[Combination], metrics: Sequence[str]) -> str:
    """The scores as the text has them, in one table of Markdown."""
    return "\n".join(markdown_table(*score_cells(rows, metrics))) + "\n"


def score_cells(rows: Sequence[Combination], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the scores, the swept keys first; a title may have several lines."""
    columns = _score_columns(rows, metrics)
    keys = short_names(list(rows[0].values)) if rows else []
    return [*(keys or ["sweep"]), *(title for title, _ in columns)], _cells(rows, columns)


Column = tuple[str, Callable[[Combination], str]]


def _score_columns(rows: Sequence[Combination], metrics: Sequence[str]) -> list[Column]:
    columns: list[Column] = [
        ("n", lambda row: str(len(row.finished))),
        ("state", lambda row: row.state),
    ]
    for name in metrics:
        key = MetricKey.parse(name)
        columns.append((f"{key.benchmark}\n{key.score}", _scored(name)))
        for beside in (f"{name}/shuffled", f"{name}/{LOOKUP}", f"{key.benchmark}/chance"):
            if beside.endswith("chance") and key.score != FIRST[0]:
                continue
            if any(row.interval(beside) for row in rows):
                columns.append((beside.rsplit("/", 1)[1], _scored(beside, short=True)))
    return columns


def _scored(name: str, short: bool = False) -> Callable[[Combination], str]:
    def cell(row: Combination) -> str:
        interval = row.interval(name)
        if interval is None:
            return "-"
        return f"{interval.mean:.3f}" if short else str(interval)

    return cell


def _cost_table(rows: Sequence[Combination]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for record in row.finished for name in record.cost))
    names.sort(key=lambda name: COST_FIRST.index(name) if name in COST_FIRST else len(COST_FIRST))
    if not names:
        return []

    def column(name: str) -> tuple[str, Callable[[Combination], str]]:
        def cell(row: Combination) -> str:
            value = row.cost(name)
            return "-" if value is None else short_number(value)

        return name, cell

    return ["", "cost (mean over seeds)", *_table(rows, [column(name) for name in names])]


def _difference_table(sweep_dir: Path, rows: Sequence[Combination], metrics: Sequence[str]) -> list[str]:
    """Differences to the first combination, where there are at least two common seeds."""
    if not metrics or len(rows) < 2 or not rows[0].by_seed(metrics[0]):
        return []
    found = {one.row.label: one for one in compare(rows, rows[0], metrics[0], single_answers=False)}
    if not any(one.difference is not None and one.difference.n > 1 for one in found.values()):
        return []

    def shown(text: Callable[[Comparison], str]) -> Callable[[Combination], str]:
        return lambda row: text(found[row.label])

    columns: list[Column] = [
        ("difference", shown(lambda one: str(one.difference or "-"))),
        ("p (Holm)", shown(lambda one: "-" if one.adjusted is None else f"{one.adjusted:.2g}")),
        ("", shown(lambda one: one.verdict)),
    ]
    note = reach(list(found.values()))
    title = f"{metrics[0]}, difference to {rows[0].label}, paired by seed"
    return [
        "",
        title,
        *_table(rows[1:], columns),
        *([f"note: {note}"] if note else []),
        f"another baseline or metric: vlmlab compare {sweep_dir} baseline=... metric=...",
    ]


def _table(rows: Sequence[Combination], columns: Sequence[Column]) -> list[str]:
    keys = short_names(list(rows[0].values)) or ["sweep"]
    return plain_table([*keys, *(title for title, _ in columns)], _cells(rows, columns), keys=len(keys))


def _cells(rows: Sequence[Combination], columns: Sequence[Column]) -> list[list[str]]:
    return [[*(row.values.values() or ["all"]), *(cell(row) for _, cell in columns)] for row in rows]


def _failures(records: Sequence[RunRecord]) -> list[str]:
    missing = [record for record in records if not record.done]
    lines = []
    for record in missing[:SHOWN_FAILURES]:
        what = " ".join(f"{key}={value}" for key, value in record.overrides.items()) or record.folder.name
        lines += textwrap.wrap(
            f"{record.state}: {what}{': ' if record.reason else ''}{record.reason}",
            terminal_width(),
            subsequent_indent="  ",
        )
        log = record.folder / "log.txt"
        lines += [f"  output in {log}"] if log.exists() else []
    if len(missing) > SHOWN_FAILURES:
        lines.append(f"and {len(missing) - SHOWN_FAILURES} more that are not done")
    return ["", *lines] if lines else []


def _notes(rows: Sequence[Combination], shared: str | None) -> list[str]:
    notes = [] if shared is None else [shared]
    if any(len(row.finished) > 1 for row in rows):
        notes.append(
            "\N{PLUS-MINUS SIGN} is the 95 % t interval over n seeds of the expected score on this one test set."
        )
    if any(record.stale for row in rows for record in row.records):
        notes.append("* made by other code of the package than the present; fresh=true trains again.")
    if any(record.other_data for row in rows for record in row.records):
        notes.append("* made with other data than are there now; fresh=true trains again.")
    return ["", *(line for note in notes for line in textwrap.wrap(note, terminal_width()))] if notes else []


def _figure(sweep_dir: Path, rows: Sequence[Combination], metrics: Sequence[str]) -> str:
    try:
        from vlmlab.analyse.figure import draw  # imports matplotlib, which takes a second

        path = draw(sweep_dir / "figure.png", rows, metrics)
    except Exception as error:  # the text and the CSV must come whatever the drawing library says
        return f"(no figure: {type(error).__name__}: {error})"
    return str(path) if path else "(no figure: nothing to draw)"

"""The table of a sweep: one row per combination of swept keys, mean and interval over seeds, whatever failed."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vlmlab.analyse.combination import SEED, Combination
from vlmlab.analyse.results import FIRST, MetricKey, RunRecord, failed_run, read_sweep
from vlmlab.analyse.stats import paired_difference
from vlmlab.analyse.table import is_count, is_level
from vlmlab.analyse.text import WIDTH, plain_table, short_number
from vlmlab.evaluate.metrics.scoring import LOOKUP
from vlmlab.runs.files import write_atomic
from vlmlab.runs.shared import sharing_note

COST_FIRST = ("params", "trainable", "visual_tokens", "seconds")
SHOWN_FAILURES = 20


def combinations(records: Sequence[RunRecord]) -> list[Combination]:
    """The cells of a sweep grouped by the keys that differ between them, without the seed."""
    keys = swept_keys(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(tuple(record.overrides.get(key, "-") for key in keys), []).append(record)
    return [
        Combination(dict(zip(keys, values, strict=True)), groups[values]) for values in sorted(groups, key=_natural)
    ]


def swept_keys(records: Sequence[RunRecord]) -> list[str]:
    """The overridden keys whose values differ between cells, in the order of the command line, without the seed."""
    keys = [key for key in dict.fromkeys(key for record in records for key in record.overrides) if key != SEED]
    return [key for key in keys if len({record.overrides.get(key) for record in records}) > 1]


def short_names(keys: Sequence[str]) -> list[str]:
    """The keys by as many of their last parts as tell them apart: ``align.steps`` of ``recipe.stages.align.steps``."""
    return [_short_name(key, [other for other in keys if other != key]) for key in keys]


def _short_name(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    ends = (".".join(parts[-size:]) for size in range(1, len(parts)))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), key)


def main_metrics(records: Sequence[RunRecord]) -> list[str]:
    """The overall scores that all finished cells have, the most telling ones first.

    A score counts where its shuffled baseline stands beside it; where no benchmark has one, every overall score.
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
    """Write ``table.csv`` and ``figure.png`` into a sweep's folder and return the table as text, 120 columns wide.

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
    lines = [*_heading(sweep_dir, records), "", *_score_table(rows, metrics)]
    lines += (
        _cost_table(rows)
        + _difference_table(rows, metrics)
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


def _score_table(rows: Sequence[Combination], metrics: Sequence[str]) -> list[str]:
    columns: list[tuple[str, Callable[[Combination], str]]] = [
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
    return _table(rows, columns)


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


def _difference_table(rows: Sequence[Combination], metrics: Sequence[str]) -> list[str]:
    """Differences to the first combination, where there are at least two common seeds."""
    if not metrics or len(rows) < 2:
        return []
    first = rows[0].by_seed(metrics[0])
    pairs = {row.label: paired_difference(row.by_seed(metrics[0]), first) for row in rows[1:]}
    if not any(pair and pair.difference.n > 1 for pair in pairs.values()):
        return []

    def difference(row: Combination) -> str:
        pair = pairs.get(row.label)
        return str(pair.difference) if pair else "-"

    def verdict(row: Combination) -> str:
        pair = pairs.get(row.label)
        return pair.verdict() if pair else "-"

    title = f"{metrics[0]}, difference to {rows[0].label}, paired by seed"
    return ["", title, *_table(rows[1:], [("difference", difference), ("", verdict)])]


def _table(rows: Sequence[Combination], columns: Sequence[tuple[str, Callable[[Combination], str]]]) -> list[str]:
    keys = short_names(list(rows[0].values)) or ["sweep"]
    cells = [[*(row.values.values() or ["all"]), *(cell(row) for _, cell in columns)] for row in rows]
    return plain_table([*keys, *(title for title, _ in columns)], cells, keys=len(keys))


def _failures(records: Sequence[RunRecord]) -> list[str]:
    missing = [record for record in records if not record.done]
    lines = []
    for record in missing[:SHOWN_FAILURES]:
        what = " ".join(f"{key}={value}" for key, value in record.overrides.items()) or record.folder.name
        lines += textwrap.wrap(
            f"{record.state}: {what}{': ' if record.reason else ''}{record.reason}", WIDTH, subsequent_indent="  "
        )
        log = record.folder / "log.txt"
        lines += [f"  output in {log}"] if log.exists() else []
    if len(missing) > SHOWN_FAILURES:
        lines.append(f"and {len(missing) - SHOWN_FAILURES} more that are not done")
    return ["", *lines] if lines else []


def _notes(rows: Sequence[Combination], shared: str | None) -> list[str]:
    notes = [] if shared is None else [shared]
    if any(len(row.finished) > 1 for row in rows):
        notes.append("\N{PLUS-MINUS SIGN} is the 95 % t interval of the mean over n seeds.")
    if any(record.stale for row in rows for record in row.records):
        notes.append("* made by other code of the package than the present; fresh=true trains again.")
    if any(record.other_data for row in rows for record in row.records):
        notes.append("* made with other data than are there now; fresh=true trains again.")
    return ["", *notes] if notes else []


def _figure(sweep_dir: Path, rows: Sequence[Combination], metrics: Sequence[str]) -> str:
    try:
        from vlmlab.analyse.figure import draw  # imports matplotlib, which takes a second

        path = draw(sweep_dir / "figure.png", rows, metrics)
    except Exception as error:  # the text and the CSV must come whatever the drawing library says
        return f"(no figure: {type(error).__name__}: {error})"
    return str(path) if path else "(no figure: nothing to draw)"


def _natural(values: tuple[str, ...]) -> list[tuple[int, float, str]]:
    """Numbers by size, before words by alphabet."""
    keyed = []
    for value in values:
        try:
            keyed.append((0, float(value), value))
        except ValueError:
            keyed.append((1, 0.0, value))
    return keyed

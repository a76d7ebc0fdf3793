"""``vlmlab compare`` in words: the table, a sentence for each comparison, the CSV and the figure."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlmlab.analyse.combination import Combination, combinations, short_names
from vlmlab.analyse.compare import Comparison, Race, chosen_row, compare, races, reach, variance
from vlmlab.analyse.results import read_sweep
from vlmlab.analyse.steps import Threshold
from vlmlab.analyse.sweep import main_metrics
from vlmlab.analyse.text import plain_table, terminal_width
from vlmlab.contracts.errors import UserError
from vlmlab.runs.files import write_atomic


def write_comparison(
    sweep: Path, baseline: str, metric: str | None = None, until: str | None = None, out: Path | None = None
) -> str:
    """Compare the compositions of a sweep with one of them; returns what to print.

    Writes ``difference_<metric>_to_<baseline>.csv`` and ``.png``, and with `until` ``steps_...csv``.

    Args:
        sweep: its folder.
        baseline: the row that all others are compared with, as for `chosen_row`.
        metric: as in ``result.json``; None: the first of the sweep's table.
        until: a threshold for the steps to it, as for `Threshold.parse`; None: none.
        out: an existing folder for the files; None: the sweep's.

    Raises:
        UserError: there is no finished cell, no such row, metric or threshold.
    """
    records = read_sweep(sweep)
    if not any(record.done for record in records):
        raise UserError(f"{sweep} has no finished cell to compare; give the folder of a sweep that has trained")
    threshold = None if until is None else Threshold.parse(until)
    rows = combinations(records)
    base = chosen_row(rows, baseline)
    if len(rows) == 1:
        raise UserError(f"{sweep} has one composition only ({base.label}); there is nothing to compare it with")
    found_metrics = main_metrics(records)
    if metric is None and not found_metrics:
        raise UserError(f"the finished cells of {sweep} have no metric in common; choose one with metric=...")
    name = metric or found_metrics[0]
    comparisons = compare(rows, base, name)
    folder = out or sweep
    stem = _clean(f"difference_{name}_to_{base.label}")
    write_atomic(folder / f"{stem}.csv", to_csv(comparisons, base, name))
    lines = [f"{name} against the baseline {base.label}, paired by seed", "", *_table(comparisons)]
    lines += [
        "",
        *_wrapped(one.sentence(base.label) for one in comparisons),
        *_variances([base, *(c.row for c in comparisons)], name),
    ]
    lines += [
        "",
        *_wrapped(_notes(comparisons)),
        "",
        f"{folder / stem}.csv  {_figure(folder / f'{stem}.png', comparisons, name)}",
    ]
    if threshold is not None:
        lines += ["", *_steps(races(rows, base, threshold), base, threshold, folder)]
    return "\n".join(lines)


def _wrapped(lines: Iterable[str]) -> list[str]:
    """Lines as wide as the terminal."""
    return [part for line in lines for part in textwrap.wrap(line, terminal_width(), subsequent_indent="  ")]


def _clean(name: str) -> str:
    """A name that a file may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:150].strip("-.")


def _table(comparisons: Sequence[Comparison]) -> list[str]:
    keys = short_names(list(comparisons[0].row.values))
    titles = [*keys, "n", "score", "difference", "95 % interval\nover seeds", "over seeds\nand questions"]
    rows = []
    for one in comparisons:
        mean = "-" if one.difference is None else f"{one.difference.mean:+.3f}"
        intervals = [one.difference.ends if one.difference else "-", one.both.ends if one.both else "-"]
        n = str(one.difference.n if one.difference else 0)
        p_values = ["-" if p is None else f"{p:.2g}" for p in (one.p_value, one.adjusted)]
        rows.append([*one.row.values.values(), n, str(one.score or "-"), mean, *intervals, *p_values, one.verdict])
    return plain_table([*titles, "p", "p\n(Holm)", ""], rows, keys=len(keys))


def _variances(rows: Sequence[Combination], metric: str) -> list[str]:
    """Where the variance of one answer's score comes from, per composition."""
    parts = [(row, found) for row in rows if (found := variance(row, metric)) is not None]
    if not parts:
        return []
    cells = [[row.label, *(f"{share:.1%}" for share in found.shares())] for row, found in parts]
    title = "where the variance of one answer's score comes from"
    return ["", title, *plain_table(["", "seed", "image", "question", "seed x question"], cells)]


def _notes(comparisons: Sequence[Comparison]) -> Iterator[str]:
    if (sentence := reach(comparisons)) is not None:
        yield f"note: {sentence}."
    yield "p: two-sided sign-flip test over seeds; (Holm): corrected for all comparisons with this baseline."
    yield "The interval over seeds is of the expected difference on this one test set: other questions are not covered."
    asked = next((one for one in comparisons if one.both is not None), None)
    if asked is None and not any(one.difference is not None and one.difference.n > 1 for one in comparisons):
        yield "No intervals: there is no second seed in common."
        return
    if asked is None:
        yield "No interval over questions: the score is not a mean over single answers, or has no predictions."
        return
    yield (
        "That over seeds and questions covers other questions of the same kind too "
        f"({asked.questions} about {asked.images} images were asked)."
    )


def _figure(path: Path, comparisons: Sequence[Comparison], metric: str) -> str:
    try:
        from vlmlab.analyse.figure import draw_differences  # imports matplotlib, which takes a second

        drawn = draw_differences(path, comparisons, metric)
    except Exception as error:  # the text and the CSV must come whatever the drawing library says
        return f"(no figure: {type(error).__name__}: {error})"
    return str(drawn) if drawn else "(no figure: nothing to draw)"


def _steps(found: Sequence[Race], baseline: Combination, threshold: Threshold, folder: Path) -> list[str]:
    keys = short_names(list(baseline.values))
    rows = [
        [*one.row.values.values(), f"{one.passed} of {len(one.passages)}", one.median]
        + ["-" if p is None else f"{p:.2g}" for p in (one.p_value, one.adjusted)]
        for one in found
    ]
    path = folder / f"{_clean(f'steps_{threshold.text}_to_{baseline.label}')}.csv"
    write_atomic(path, _steps_csv(found, threshold))
    return [
        f"steps until {threshold.text}, counted over all stages, at the steps that were looked at",
        "",
        *plain_table([*keys, "passed", "median step", "p", "p\n(Holm)"], rows, keys=len(keys)),
        "",
        *_wrapped(
            ["p: two-sided permutation test of the log-rank statistic; runs that never passed count as censored."]
        ),
        str(path),
    ]


def _steps_csv(found: Sequence[Race], threshold: Threshold) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*found[0].row.values, "until", "step", "passed", "p", "p_holm"])
    for one in found:
        p_values = ["" if p is None else repr(p) for p in (one.p_value, one.adjusted)]
        for run in one.passages:
            writer.writerow(
                [*one.row.values.values(), threshold.text, f"{run.step:g}", int(not run.censored), *p_values]
            )
    return out.getvalue()


def to_csv(comparisons: Sequence[Comparison], baseline: Combination, metric: str) -> str:
    """The table with every number in full; empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"{name}{end}" for name in ("score", "difference", "both") for end in ("", "/low", "/high")]
    keys = list(baseline.values)
    writer.writerow([*keys, "metric", "baseline", "n", *ends, "p", "p_holm", "verdict", "questions", "images"])
    for one in comparisons:
        numbers = [
            value
            for interval in (one.score, one.difference, one.both)
            for value in ((interval.mean, interval.low, interval.high) if interval else (None,) * 3)
        ]
        p_values = (one.p_value, one.adjusted)
        n = one.difference.n if one.difference else 0
        shown = ["" if value is None else repr(float(value)) for value in (*numbers, *p_values)]
        writer.writerow(
            [*one.row.values.values(), metric, baseline.label, n, *shown, one.verdict, one.questions, one.images]
        )
    return out.getvalue()

"""The page of a recorded experiment from its ``cells.csv``: ``answer.py connector_vs_mask --baseline mlp,bidir``.

Trains nothing. Rewrites what stands between the two marks of ``<experiment>/README.md``, and draws its figure; what is
around them, the question and the answer in words, is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sweeps import markdown, number, with_page  # noqa: E402  # first: it finds the package

from vlmlab.analyse.combination import Combination, combinations, short_names  # noqa: E402
from vlmlab.analyse.compare import Comparison, chosen_row, compare, reach  # noqa: E402
from vlmlab.analyse.results import RunRecord, parse_overrides  # noqa: E402
from vlmlab.runs.cells_csv import Row, cost_of, metrics_of, overrides_of, read_cells  # noqa: E402
from vlmlab.runs.files import write_atomic  # noqa: E402

METRIC = "world_test/vqa_accuracy"
BESIDE = ("/shuffled", "/lookup")


def main() -> int:
    """Rewrite the page, or say with ``--check`` whether it is what the record gives; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", help="name of a folder with cells.csv and README.md")
    parser.add_argument("--baseline", required=True, help="the row that all others are compared with")
    parser.add_argument("--metric", default=METRIC)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    given = parser.parse_args()
    folder = HERE / given.experiment
    cells = read_cells(folder / "cells.csv")
    rows = combinations([record(row) for row in cells])
    base = chosen_row(rows, given.baseline)
    compared = compare(rows, base, given.metric, single_answers=False)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    text = with_page(readme, page(rows, base, compared, given.metric), "cells.csv")
    if given.check:
        return int(text != readme)
    write_atomic(folder / "README.md", text)
    drawn(folder / "figure.png", compared, given.metric)
    return 0


def record(row: Row) -> RunRecord:
    """A row as the run that it was."""
    overrides = parse_overrides(overrides_of(row))
    return RunRecord(Path(row["cell"]), "done", "", overrides, metrics_of(row), cost_of(row))


def page(rows: Sequence[Combination], base: Combination, compared: Sequence[Comparison], metric: str) -> list[str]:
    """Both tables, the sentences and what they cost."""
    cells = [cell for row in rows for cell in row.finished]
    hours = sum(cell.cost.get("seconds", 0.0) for cell in cells) / 3600
    lines = [*_scores(rows, metric), "", f"Difference of `{metric}` to {base.label}, paired by seed:", ""]
    lines += [*_differences(compared), "", *(f"- {one.sentence(base.label)}" for one in compared)]
    if (sentence := reach(compared)) is not None:
        lines += ["", f"{sentence[0].upper()}{sentence[1:]}."]
    lines += ["", f"{len(cells)} cells, {hours:.2f} hours of training; ± and intervals: 95 %, t over seeds."]
    return [*lines, "", "![the differences with their intervals](figure.png)"]


def _scores(rows: Sequence[Combination], metric: str) -> list[str]:
    keys = short_names(list(rows[0].values))
    titles = [*keys, "n", "accuracy", "shuffled", "lookup", "normalised", "CIDEr-D", "visual tokens", "training, s"]
    table = []
    for row in rows:
        normalised = metric.rpartition("/")[0] + "/normalised"
        scores = (metric, *(metric + floor for floor in BESIDE), normalised, "world_captions/cider_d")
        costs = (number(row.cost(name), 0) for name in ("visual_tokens", "seconds"))
        values = [number(row.interval(name)) for name in scores]
        table.append([*row.values.values(), str(len(row.finished)), *values, *costs])
    return markdown(titles, table)


def _differences(compared: Sequence[Comparison]) -> list[str]:
    keys = short_names(list(compared[0].row.values))
    table = []
    for one in compared:
        mean, ends = ("-", "-") if one.difference is None else (f"{one.difference.mean:+.3f}", one.difference.ends)
        p_values = ["-" if p is None else f"{p:.2g}" for p in (one.p_value, one.adjusted)]
        n = str(one.difference.n if one.difference else 0)
        table.append([*one.row.values.values(), n, mean, ends, *p_values, one.verdict])
    return markdown([*keys, "n", "difference", "95 % interval", "p", "p (Holm)", ""], table)


def drawn(path: Path, compared: Sequence[Comparison], metric: str) -> bool:
    """The differences with their intervals; False without matplotlib."""
    try:
        from vlmlab.analyse.figure import draw_differences
    except ImportError:
        return False
    return bool(draw_differences(path, compared, metric))


if __name__ == "__main__":
    sys.exit(main())

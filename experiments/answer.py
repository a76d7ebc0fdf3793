"""The page of a recorded experiment from its ``cells.csv``: ``answer.py connector_vs_mask --baseline mlp,bidir``.

Trains nothing. Rewrites what stands between the two marks of ``<experiment>/README.md``, and draws its figures; what is
around them, the question and the answer in words, is written by hand. What cells saw while they trained comes from
``looks.csv`` beside the record: ``--look caption_pretrain:first:held_out/loss --until 'held_out/gap>0.1'``.
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
from vlmlab.analyse.compare import Comparison, chosen_row, compare, races, reach, row_look  # noqa: E402
from vlmlab.analyse.read import reader_of  # noqa: E402
from vlmlab.analyse.results import read_record  # noqa: E402
from vlmlab.analyse.steps import GAP, Threshold  # noqa: E402
from vlmlab.contracts.errors import UserError  # noqa: E402
from vlmlab.runs.cells_csv import read_cells  # noqa: E402
from vlmlab.runs.files import write_atomic  # noqa: E402
from vlmlab.runs.looks_csv import NAME as LOOKS  # noqa: E402

METRIC = "world_test/vqa_accuracy"
BESIDE = ("/shuffled", "/lookup")


def main() -> int:
    """Rewrite the page, or say with ``--check`` whether it is what the record gives; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", help="name of a folder with cells.csv and README.md")
    parser.add_argument("--baseline", required=True, help="the row that all others are compared with")
    parser.add_argument("--metric", default=METRIC)
    parser.add_argument("--until", nargs="*", default=[], help="thresholds: steps to each of them")
    parser.add_argument("--look", nargs="*", default=[], help="<stage>:first|last:<name>: a column each")
    parser.add_argument("--curve", default=GAP, help="what the curves show, where cells have looked")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    given = parser.parse_args()
    folder = HERE / given.experiment
    if not read_cells(folder / "cells.csv"):
        print(f"{folder}/cells.csv has no cell yet; train: python train.py -m +experiment={given.experiment}")
        return 1
    rows = combinations(read_record(folder / "cells.csv"))
    base = chosen_row(rows, given.baseline)
    compared = compare(rows, base, given.metric, single_answers=False)
    seen = Seen(folder / "cells.csv")
    lines = page(rows, base, compared, given.metric)
    lines += seen.table(rows, given.look)
    lines += [line for until in given.until for line in seen.steps(rows, base, until)]
    lines += ["", f"![{given.curve} while they trained](curves.png)"] if seen.looks else []
    readme = (folder / "README.md").read_text(encoding="utf-8")
    text = with_page(readme, lines, "cells.csv")
    if given.check:
        return int(text != readme)
    write_atomic(folder / "README.md", text)
    drawn(folder, compared, given.metric, rows, given.curve, seen)
    return 0


class Seen:
    """What the cells of a record saw while they trained.

    Args:
        record: the record.

    Attributes:
        looks: whether they looked.
        read: gives the looks of a cell.
    """

    def __init__(self, record: Path) -> None:
        self.looks = record.with_name(LOOKS).is_file()
        self.read = reader_of(record)

    def table(self, rows: Sequence[Combination], wanted: Sequence[str]) -> list[str]:
        """A column for each look that is named, under a heading; nothing where none is."""
        if not wanted or not self.looks:
            return []
        keys = short_names(list(rows[0].values))
        columns = [_look(text) for text in wanted]
        titles = [f"{name}, {'end' if last else 'beginning'} of {stage}" for stage, last, name in columns]
        table = [
            [
                *row.values.values(),
                *(number(row_look(row, stage, name, last, self.read)) for stage, last, name in columns),
            ]
            for row in rows
        ]
        return ["", "Held-out losses, in nats per token:", "", *markdown([*keys, *titles], table)]

    def steps(self, rows: Sequence[Combination], base: Combination, until: str) -> list[str]:
        """Steps to a threshold, censored at the last look."""
        if not self.looks:
            return []
        found = races(rows, base, Threshold.parse(until), self.read)
        keys = short_names(list(base.values))
        table = [
            [*one.row.values.values(), f"{one.passed} of {len(one.passages)}", one.median]
            + ["-" if p is None else f"{p:.2g}" for p in (one.p_value, one.adjusted)]
            for one in found
        ]
        titles = [*keys, "passed", "median step", "p", "p (Holm)"]
        return ["", f"Steps until `{until}`, over all stages, censored at the last look:", "", *markdown(titles, table)]


def _look(text: str) -> tuple[str, bool, str]:
    stage, _, rest = text.partition(":")
    when, _, name = rest.partition(":")
    if when not in ("first", "last") or not stage or not name:
        raise UserError(f"--look {text} names no look; write <stage>:first:<name> or <stage>:last:<name>")
    return stage, when == "last", name


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


def drawn(
    folder: Path, compared: Sequence[Comparison], metric: str, rows: Sequence[Combination], curve: str, seen: Seen
) -> bool:
    """The differences with their intervals, and the curves; False without matplotlib."""
    try:
        from vlmlab.analyse.figure import draw_curves, draw_differences
    except ImportError:
        return False
    if seen.looks:
        draw_curves(folder / "curves.png", rows, curve, seen.read)
    return bool(draw_differences(folder / "figure.png", compared, metric))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

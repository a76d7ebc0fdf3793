"""The page of ``claims/``: one line a claim, from the records of the experiments that have its two cells.

Trains nothing. Rewrites what stands between the two marks of ``claims/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from answer import METRIC  # noqa: E402  # first: it finds the package
from sweeps import markdown, number, with_page  # noqa: E402

from vlmlab.analyse.combination import Combination, combinations  # noqa: E402
from vlmlab.analyse.results import read_record  # noqa: E402
from vlmlab.analyse.stats import Interval, counted, paired_difference  # noqa: E402
from vlmlab.runs.cells_csv import read_cells  # noqa: E402
from vlmlab.runs.files import write_atomic  # noqa: E402

OWN = "claims"
MARGIN = 0.03
"""Two cells are the same where the interval of their difference lies within so much of 0."""
FEWEST = 3
"""Common seeds below which nothing is decided."""
SEEN, NOT_SEEN, OPPOSITE, UNDECIDED = "seen", "not seen", "not seen: the opposite", "not decidable here"


@dataclass(frozen=True)
class Claim:
    """What a source says of two cells.

    Attributes:
        id: name of its line.
        source: where it is said.
        says: what, in our words.
        expect: ``higher``, the first scores higher, or ``same``, the two differ by less than `MARGIN`.
        cells: (experiment, row) of the first and of the second.
        metrics: of the first and of the second.
    """

    id: str
    source: str
    says: str
    expect: str
    cells: tuple[tuple[str, str], tuple[str, str]]
    metrics: tuple[str, str]


@dataclass(frozen=True)
class Found:
    """What the records say of a claim.

    Attributes:
        verdict: one of the four.
        why: what it is not decidable for; empty where it is.
        first, second: scores over seeds, None where there is no cell.
        difference: over common seeds, None without one.
    """

    verdict: str
    why: str = ""
    first: Interval | None = None
    second: Interval | None = None
    difference: Interval | None = None


def read_claims(path: Path) -> list[Claim]:
    """The claims of a file, in its order."""
    return [_claim(entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def _claim(entry: Mapping[str, Any]) -> Claim:
    metric = entry.get("metric", METRIC)
    first, second = (tuple(cell.split("/")) if "/" in cell else (OWN, cell) for cell in entry["cells"])
    metrics = (metric, metric) if isinstance(metric, str) else tuple(metric)
    return Claim(entry["id"], entry["source"], entry["says"], entry["expect"], (first, second), metrics)


@cache
def rows_of(folder: Path) -> dict[str, Combination]:
    """The compositions of an experiment's record by their labels, none where nothing is recorded."""
    return {row.label: row for row in combinations(read_record(folder / "cells.csv"))}


def judged(claim: Claim, at: Path = HERE) -> Found:
    """What the records below a folder say of a claim."""
    rows = [rows_of(at / experiment).get(row) for experiment, row in claim.cells]
    first, second = (row and row.interval(metric) for row, metric in zip(rows, claim.metrics, strict=True))
    if rows[0] is None or rows[1] is None or first is None or second is None:
        return Found(UNDECIDED, "not trained yet", first, second)
    pair = paired_difference(rows[0].by_seed(claim.metrics[0]), rows[1].by_seed(claim.metrics[1]))
    if pair is None or pair.difference.n < FEWEST:
        n = pair.difference.n if pair else 0
        return Found(UNDECIDED, f"{counted(n, 'common seed')}", first, second, pair and pair.difference)
    if not any(_looks(row, metric) for row, metric in zip(rows, claim.metrics, strict=True) if row):
        return Found(UNDECIDED, "neither is above its floor", first, second, pair.difference)
    return Found(_verdict(claim, pair.difference), "", first, second, pair.difference)


def _looks(row: Combination, metric: str) -> bool:
    """Whether a composition is above the highest score that needs no look at the right image, over its seeds."""
    above = row.interval(metric.rpartition("/")[0] + "/normalised")
    return above is not None and above.low is not None and above.low > 0


def _verdict(claim: Claim, difference: Interval) -> str:
    assert difference.low is not None and difference.high is not None
    if claim.expect == "same":
        return SEEN if difference.low > -MARGIN and difference.high < MARGIN else NOT_SEEN
    return SEEN if difference.low > 0 else OPPOSITE if difference.high < 0 else NOT_SEEN


def page(claims: Sequence[Claim], at: Path = HERE) -> list[str]:
    """The table and what may be said of it."""
    found = [judged(claim, at) for claim in claims]
    titles = ["source", "says", "first", "second", "n", "first", "second", "difference", "95 % interval", ""]
    lines = []
    for claim, one in zip(claims, found, strict=True):
        names = [row if experiment == OWN else f"{experiment}: {row}" for experiment, row in claim.cells]
        mean, ends = ("-", "-") if one.difference is None else (f"{one.difference.mean:+.3f}", one.difference.ends)
        verdict = one.verdict + (f" ({one.why})" if one.why else "")
        n = str(one.difference.n if one.difference else 0)
        lines.append([claim.source, claim.says, *names, n, *map(number, (one.first, one.second)), mean, ends, verdict])
    counts = Counter(one.verdict for one in found)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (SEEN, NOT_SEEN, OPPOSITE, UNDECIDED))
    return [*markdown(titles, lines), "", f"{counted(len(claims), 'claim')}: {told}.", *_reach(found)]


def _reach(found: Sequence[Found]) -> list[str]:
    """The effect that a line not seen could have shown."""
    halves = [one.difference.half for one in found if one.verdict == NOT_SEEN and one.difference]
    known = [half for half in halves if half is not None]
    if not known:
        return []
    return [
        "",
        f"Differences beyond ±{max(known):.3f} (the widest interval's half) would have been seen in every line.",
    ]


def main() -> int:
    """Rewrite the page, or say with ``--check`` whether it is what the records give; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page differs")
    given = parser.parse_args()
    folder = HERE / OWN
    if not read_cells(folder / "cells.csv"):
        print(f"{folder}/cells.csv has no cell yet; train: python train.py -m +experiment={OWN}")
        return 1
    readme = (folder / "README.md").read_text(encoding="utf-8")
    text = with_page(readme, page(read_claims(folder / "claims.yaml")), "cells.csv")
    if given.check:
        return int(text != readme)
    write_atomic(folder / "README.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

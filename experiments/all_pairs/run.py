"""Run the all-pairs design, or a seeded part of it: ``python experiments/all_pairs/run.py --help``."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.slow.pairs import Compositions, Outcome, Row, attempt, design, sentences, summary  # noqa: E402

HERE = Path(__file__).parent


def main() -> int:
    """Write ``rows.csv`` as rows end, print the counts and every sentence; 1 if a row failed without one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="only so many, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--out", type=Path, default=HERE / "rows.csv")
    given = parser.parse_args()
    rows = design()
    if given.rows is not None:
        rows = random.Random(given.seed).sample(rows, min(given.rows, len(rows)))
    outcomes = _run(rows, given.minutes, given.out)
    print(f"{summary(outcomes)}\n\n{sentences(outcomes)}")
    return int(any(outcome.kind == "failed" for outcome in outcomes))


def _run(rows: list[Row], minutes: float | None, out: Path) -> list[Outcome]:
    make, outcomes, spent = Compositions(), [], 0.0
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*rows[0], "outcome", "seconds", "message"])
        for index, row in enumerate(rows):
            if minutes is not None and spent > 60 * minutes:
                break
            folder = Path(tempfile.mkdtemp(prefix="all-pairs-"))
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                outcome = attempt(row, make, folder)
            shutil.rmtree(folder, ignore_errors=True)
            outcomes.append(outcome)
            spent += outcome.seconds
            writer.writerow([*row.values(), outcome.kind, f"{outcome.seconds:.2f}", outcome.message])
            file.flush()
            print(f"{index + 1}/{len(rows)} {outcome.kind} {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())

"""Pages of recorded experiments say what their records say."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from vlmlab.analyse.combination import combinations
from vlmlab.analyse.compare import compare
from vlmlab.runs.cells_csv import CellsCsv, read_cells
from vlmlab.runs.folder import RunFolder

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import answer  # noqa: E402  # scripts beside the package
import sweeps  # noqa: E402

RECORDED = sorted(EXPERIMENTS.glob("*/cells.csv"))


@pytest.mark.parametrize("record", RECORDED, ids=lambda record: record.parent.name)
def test_a_page_is_what_its_record_gives(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (record.parent / "README.md").read_text()
    command = re.search(r"^    python experiments/(answer\.py .*)$", readme, re.MULTILINE)
    assert command is not None, "the page does not say how it is made"
    monkeypatch.setattr(sys, "argv", [*shlex.split(command[1]), "--check"])
    assert answer.main() == 0


def test_a_page_has_every_composition_and_comparison(tmp_path: Path) -> None:
    for mask, score in (("bidir", 0.5), ("causal", 0.4)):
        for seed in range(3):
            with RunFolder(tmp_path / f"mask-{mask}_seed-{seed}") as run:
                run.open({"mask": mask, "seed": seed}, [f"mask={mask}", f"seed={seed}", "+experiment=x"])
                metrics = {answer.METRIC: score + 0.01 * seed, answer.METRIC + "/lookup": 0.3}
                run.finish(metrics, {"seconds": 3600.0, "visual_tokens": 36})
    CellsCsv(tmp_path / "cells.csv").add(sorted(tmp_path.glob("mask-*")))
    rows = combinations([answer.record(row) for row in read_cells(tmp_path / "cells.csv")])
    compared = compare(rows, rows[0], answer.METRIC, single_answers=False)
    text = "\n".join(answer.page(rows, rows[0], compared, answer.METRIC))
    assert "| bidir | 3 | 0.510 ± 0.025 | - | 0.300 ± 0.000 |" in text
    assert "| causal | 3 | -0.100 |" in text and "not distinguishable" in text
    assert "With 3 seeds and 1 comparison nothing can be significant" in text and "6 cells, 6.00 hours" in text
    begin, end = "<!-- from cells.csv -->", "<!-- /from cells.csv -->"
    page = sweeps.with_page(f"before\n{begin}\nold\n{end}\nafter\n", ["new"], "cells.csv")
    assert page == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"

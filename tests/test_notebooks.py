"""Notebooks that are shipped executed are those of their scripts, and read what is in the repository."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(ROOT / "experiments"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_an_executed_notebook_is_its_script_with_what_it_shows(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(path.with_suffix(".py"))
    found = cells(path)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in found] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], f"execute it again: python experiments/execute.py {path.stem}"
    outputs = [output for cell in found for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert not re.search(r"/(?:tmp|root|home|Users)/", path.read_text()), "a machine's path"


def test_the_analysis_of_an_ablation_is_shipped_executed() -> None:
    assert [path.stem for path in EXECUTED] == ["ablation_analysis"]


@pytest.mark.slow
def test_a_notebook_reads_a_record_with_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of two compositions that were looked at while they trained: curves with bands among the figures."""
    import execute

    from vlmlab.runs.cells_csv import CellsCsv
    from vlmlab.runs.folder import RunFolder

    for mask in ("bidir", "causal"):
        for seed in range(3):
            with RunFolder(tmp_path / "cells" / f"mask-{mask}_seed-{seed}") as run:
                run.open({"mask": mask, "seed": seed}, [f"mask={mask}", f"seed={seed}"])
                for step in range(3):
                    run.log({"stage": "a", "step": step, "held_out/loss": 2.0 - step, "held_out/shuffled_loss": 2.0})
                score = 0.5 + 0.01 * seed
                metrics = {"world_test/vqa_accuracy": score, "world_test/vqa_accuracy/shuffled": 0.3}
                kinds = {"world_test/normalised/kind/count": 0.2}
                run.finish(metrics | kinds, {"seconds": 5.0, "trainable": 3, "flops_sample": 7})
    CellsCsv(tmp_path / "cells.csv").add(sorted((tmp_path / "cells").iterdir()))
    shutil.copy(ROOT / "notebooks" / "ablation_analysis.py", tmp_path)
    monkeypatch.setenv("RESULTS", "cells.csv")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = execute.executed(tmp_path / "ablation_analysis.py")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "no single answers here" in "".join(output.get("text", "") for output in outputs)

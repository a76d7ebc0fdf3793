"""The notebooks run from top to bottom, on a run and a sweep of two steps a stage."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbclient
import pytest

from tests.slow.runs import ROOT, command

pytestmark = pytest.mark.slow
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
MADE_BY = {
    "ablation_analysis": ["-m", "name=x", "connector=mlp,qformer", "mask=bidir,causal", "budget=test"],
    "masks_and_attention": ["name=demo", "budget=test"],
}
"""What has to be run first, in the words of the notebook's comments but for the seeds."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND")  # the kernel draws into the notebook
    monkeypatch.setenv("RESULTS", "../sweeps/x")
    if path.stem in MADE_BY:
        assert command("train.py", *MADE_BY[path.stem], cwd=tmp_path).returncode == 0
    (tmp_path / "notebooks").mkdir()
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) >= 3

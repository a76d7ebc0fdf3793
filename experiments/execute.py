"""Execute a notebook and write it, with what it shows, beside its script: ``execute.py ablation_analysis``.

Times and the machine's versions are left out, so that the same results give the same file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main() -> int:
    """Execute and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", help="name of a script in notebooks/")
    path = NOTEBOOKS / f"{parser.parse_args().notebook}.py"
    source = str(NOTEBOOKS.parent / "src")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    nbformat.write(executed(path), path.with_suffix(".ipynb"))
    return 0


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook of a script with its outputs."""
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False
    )
    client.execute()
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)}
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    return notebook


if __name__ == "__main__":
    sys.exit(main())

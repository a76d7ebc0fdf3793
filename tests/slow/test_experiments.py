"""The scripts of ``experiments/`` run from end to end and write their tables; no number in these is worth reading."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slow.runs import command

pytestmark = pytest.mark.slow


def test_two_adapters(tmp_path: Path) -> None:
    words = ("budget=test", "--run", str(tmp_path / "run"), "--out", str(tmp_path))
    done = command("experiments/two_adapters/run.py", *words, cwd=tmp_path)
    assert done.returncode == 0
    text = (tmp_path / "table.md").read_text()
    for part in ("| chance |", "100.0% of 16 answers", "| one base, two adapters |", "of the largest logit"):
        assert part in text
    before = os.stat(tmp_path / "run" / "result.json").st_mtime
    assert command("experiments/two_adapters/run.py", *words, cwd=tmp_path).returncode == 0
    assert os.stat(tmp_path / "run" / "result.json").st_mtime == before, "a finished run is not trained again"


def test_connectors(tmp_path: Path) -> None:
    words = ("--budget", "test", "--seeds", "0", "--at", str(tmp_path), "--out", str(tmp_path / "out"))
    done = command("experiments/connectors/run.py", "--only", "pool", *words, cwd=tmp_path)
    assert done.returncode == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| pool, side 4 | 16 | 1 |" in text and "support no significance claim" in text
    assert (tmp_path / "out" / "figure.png").exists()
    again = command("experiments/connectors/run.py", "--table", *words, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "out" / "table.md").read_text() == text

"""The scripts of ``experiments/`` run from end to end and write their tables; no number in these is worth reading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slow.runs import ROOT, command

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
    assert "Right images minus what comes without looking" in text and text.count("| pool, side 4 |") == 2
    assert (tmp_path / "out" / "figure.png").exists()
    again = command("experiments/connectors/run.py", "--table", *words, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "out" / "table.md").read_text() == text


def test_a_signal_ends_with_the_sweep_it_met(tmp_path: Path) -> None:
    words = ["--budget", "test", "--seeds", "0", "--at", str(tmp_path), "--out", str(tmp_path / "out")]
    script = [sys.executable, str(ROOT / "experiments/connectors/run.py"), "--only", "pool", "resampler", *words]
    started = subprocess.Popen(script, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert started.stdout is not None
    seen = []
    for line in started.stdout:
        seen.append(line)
        if ": running" in line:
            started.send_signal(signal.SIGTERM)
            break
    seen += started.stdout.readlines()
    assert started.wait() == 130, "".join(seen)
    assert (tmp_path / "sweeps" / "connectors_pool_test").exists() and "Traceback" not in "".join(seen)
    assert not (tmp_path / "sweeps" / "connectors_resampler_test").exists(), "the next sweep was not begun"


def test_medical_vqa(tmp_path: Path, shared_data: Path) -> None:
    words = ("--budget", "test", "--seeds", "0", "--at", str(tmp_path), "--out", str(tmp_path / "out"))
    words += ("--data", str(shared_data), "--only", "slake")
    done = command("experiments/medical_vqa/run.py", *words, cwd=tmp_path)
    assert done.returncode == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| slake | 64 | 16 | " in text and "| slake | 128 | 64 | " in text
    assert "support no significance claim" in text
    lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert {line.split(",")[5] for line in lines[1:]} == {
        "right image",
        "shuffled",
        "no_image",
        "commonest training answer",
        "lookup",
    }
    again = command("experiments/medical_vqa/run.py", "--table", *words, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "out" / "table.md").read_text() == text

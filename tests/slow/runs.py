"""Running the commands as a user does, in a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def command(script: str, *arguments: str, cwd: Path, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """``python <script> <arguments>`` from another folder; its output is in the failure message."""
    return _run([str(ROOT / script), *arguments], cwd, timeout)


def verb(*words: str, cwd: Path, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """``vlmlab <words>`` from another folder."""
    return _run(["-m", "vlmlab.cli", *words], cwd, timeout)


def _run(words: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd, env=environment, text=True, capture_output=True, timeout=timeout, check=False,
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-6000:])
    return done


def trained(*arguments: str, cwd: Path) -> dict[str, Any]:
    """The result of a run that must succeed."""
    done = command("train.py", "name=run", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((cwd / "outputs" / "run" / "result.json").read_text())
    return result

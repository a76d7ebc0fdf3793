"""What the experiments share: a sweep as its command would run it by hand, its processor time, numbers in a table."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from vlmlab.analyse.stats import Interval  # noqa: E402


def command(words: Sequence[str]) -> str:
    """What to type for a sweep."""
    return " ".join(["python train.py -m", *words])


def run_sweep(words: Sequence[str], at: Path, name: str) -> int:
    """Run one sweep, and add its processor time to ``cpu.json`` in its folder; its exit code.

    Args:
        words: overrides; ``name=<name>`` is one of them.
        at: folder to run it from.
        name: folder below ``at/sweeps``.
    """
    at.mkdir(parents=True, exist_ok=True)
    print(f"\n{command(words)}", flush=True)
    before = _cpu_seconds()
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    script = [sys.executable, str(ROOT / "train.py"), "-m", *words]
    code = subprocess.run(script, cwd=at, env=environment, check=False).returncode
    path = at / "sweeps" / name / "cpu.json"
    if path.parent.is_dir():
        path.write_text(json.dumps({"cpu_seconds": cpu_hours(path.parent) * 3600 + _cpu_seconds() - before}) + "\n")
    return code


def cpu_hours(sweep: Path) -> float:
    """Processor time of a sweep so far, starting and scoring included."""
    path = sweep / "cpu.json"
    return float(json.loads(path.read_text())["cpu_seconds"]) / 3600 if path.is_file() else 0.0


def _cpu_seconds() -> float:
    """Processor time of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return [head, "|" + "---|" * len(titles), *lines]


def number(value: float | Interval | None, digits: int = 1) -> str:
    """A number, an interval, or a dash where there is none."""
    return "-" if value is None else str(value) if isinstance(value, Interval) else f"{value:.{digits}f}"

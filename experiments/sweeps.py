"""What the experiments share: a sweep as its command would run it by hand, its processor time, numbers in a table."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from vlmlab.analyse.stats import Interval  # noqa: E402
from vlmlab.analyse.text import markdown_table as markdown  # noqa: E402, F401
from vlmlab.cli.entry import INTERRUPTED  # noqa: E402


def command(words: Sequence[str]) -> str:
    """What to type for a sweep."""
    return " ".join(["python train.py -m", *words])


def with_page(readme: str, lines: Sequence[str], record: str) -> str:
    """A README with these lines between its marks ``<!-- from <record> -->`` and ``<!-- /from <record> -->``."""
    begin, end = f"<!-- from {record} -->", f"<!-- /from {record} -->"
    before, _, rest = readme.partition(begin)
    return "\n".join([before + begin, "", *lines, "", end]) + rest.partition(end)[2]


def run_sweeps(sweeps: Mapping[str, Sequence[str]], at: Path) -> int:
    """Run sweeps one after the other; the worst exit code. One that a signal stopped is the last.

    Args:
        sweeps: overrides by the name of the sweep's folder below ``at/sweeps``; ``name=<name>`` is one of them.
        at: folder to run them from.
    """
    worst = 0
    for name, words in sweeps.items():
        worst = max(worst, code := _run_sweep(words, at, name))
        if code == INTERRUPTED:
            break
    return worst


def _run_sweep(words: Sequence[str], at: Path, name: str) -> int:
    """Run one sweep, and add its processor time to ``cpu.json`` in its folder; its exit code."""
    at.mkdir(parents=True, exist_ok=True)
    print(f"\n{command(words)}", flush=True)
    before = _cpu_seconds()
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "-m", *words], cwd=at, env=environment)
    with _left_to(process):
        code = process.wait()
    path = at / "sweeps" / name / "cpu.json"
    if path.parent.is_dir():
        path.write_text(json.dumps({"cpu_seconds": cpu_hours(path.parent) * 3600 + _cpu_seconds() - before}) + "\n")
    return INTERRUPTED if -code in (signal.SIGINT, signal.SIGTERM) else code


@contextmanager
def _left_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave signals to the sweep, which tells its cells and ends: SIGTERM is handed on, SIGINT comes to it too."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number)),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cpu_hours(sweep: Path) -> float:
    """Processor time of a sweep so far, starting and scoring included."""
    path = sweep / "cpu.json"
    return float(json.loads(path.read_text())["cpu_seconds"]) / 3600 if path.is_file() else 0.0


def _cpu_seconds() -> float:
    """Processor time of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def number(value: float | Interval | None, digits: int = 1) -> str:
    """A number, an interval, or a dash where there is none."""
    return "-" if value is None else str(value) if isinstance(value, Interval) else f"{value:.{digits}f}"

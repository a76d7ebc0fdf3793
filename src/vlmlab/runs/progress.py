"""What a run's files say of how far it is, while it runs and from another machine. Free of numpy and torch."""

from __future__ import annotations

import json
from pathlib import Path

TAIL = 16_384
"""Bytes at the end of ``metrics.jsonl`` in which the last losses are looked for."""
JOB = "job.json"
"""In the folder of a cell that a scheduler has: which, and the number of the job."""


def losses(folder: Path) -> str:
    """The last training loss of a run, and after a slash the last held-out one where there is one."""
    last: dict[str, float] = {}
    for line in _tail(folder / "metrics.jsonl"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name in ("loss", "held_out/loss"):
            if isinstance(row, dict) and isinstance(row.get(name), int | float):
                last[name] = row[name]
    return "/".join(f"{value:.3g}" for _, value in sorted(last.items(), reverse=True))


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as rows:
            rows.seek(max(0, file.stat().st_size - TAIL))
            return rows.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def duration(seconds: float | None) -> str:
    """``45 s``, ``12 min``, ``3.5 h``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def last_sign(folder: Path) -> float | None:
    """When a run last wrote something (seconds since 1970); None: never."""
    times = []
    for name in ("state.json", "metrics.jsonl", "log.txt"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)

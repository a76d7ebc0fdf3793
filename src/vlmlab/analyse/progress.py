"""How the cells of a sweep are doing, from their folders alone: also while they run, and from another machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from vlmlab.analyse.results import RunRecord, read_sweep
from vlmlab.analyse.sweep import main_metrics
from vlmlab.analyse.text import plain_table
from vlmlab.runs.files import read_json
from vlmlab.runs.progress import JOB, duration, last_sign, losses


def show_sweep(sweep: Path, now: float | None = None) -> str:
    """The cells of a sweep with their states, those in flight among them, as text.

    Args:
        sweep: its folder.
        now: seconds since 1970; None: the clock.
    """
    records = read_sweep(sweep)
    if not records:
        return f"{sweep} holds no cell"
    now = time.time() if now is None else now
    states = [record.state for record in records]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    metrics = main_metrics(records)
    title = metrics[0].replace("/", "\n", 1) if metrics else "score"
    rows = [_row(record, metrics, now) for record in records]
    titles = ["cell", "state", "where", "loss", title, "last sign\nof life"]
    return "\n".join([f"{sweep}: {len(records)} cells: {counted}", "", *plain_table(titles, rows)])


def _row(record: RunRecord, metrics: Sequence[str], now: float) -> list[str]:
    done = record.done
    score = f"{record.metrics[metrics[0]]:.3f}" if done and metrics else ""
    loss = "" if done else losses(record.folder)
    sign = last_sign(record.folder)
    ago = "" if done or sign is None else f"{duration(max(0.0, now - sign))} ago"
    return [record.folder.name, record.state, _where(record), loss, score, ago]


def _where(record: RunRecord) -> str:
    if record.state == "running":
        state = read_json(record.folder / "state.json") or {}
        steps = f"/{state['steps']}" if state.get("steps") else ""
        return f"{state.get('stage') or 'starting'} {state.get('step') or 0}{steps}"
    job = None if record.done else read_json(record.folder / JOB)
    if job is None:
        return record.reason or ""
    named = f"{job.get('scheduler')} job {job.get('id')}"
    return f"waits for its next run, {named}" if record.state == "interrupted" else record.reason or named

"""What a run folder holds, read without ever failing, and what the name of a metric says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmlab.contracts.errors import UserError
from vlmlab.evaluate.metrics.scoring import BESIDE
from vlmlab.runs.cells_csv import cost_of, metrics_of, overrides_of, read_cells
from vlmlab.runs.data import CHANGED
from vlmlab.runs.files import read_json, read_yaml
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.lock import is_locked
from vlmlab.runs.names import override_key

FIRST = ("vqa_accuracy", "option_accuracy", "cider_d", "iou_accuracy", "answer_form")
"""Scores that come first in tables and that figures show."""
FLOOR = "floor"
"""Before the name of the highest floor, the one that ``normalised`` is over."""


@dataclass(frozen=True)
class MetricKey:
    """A metric's name, taken apart: ``<benchmark>/[human/]<score>[/kind/<kind>|/<group>][/count][/<baseline>]``.

    Attributes:
        benchmark: the first part.
        score: such as ``vqa_accuracy``, ``chance``, ``floor/lookup``, ``cider_d``, ``human/cider_d``,
            ``vqa_accuracy/count``, ``vqa_accuracy/<group>``.
        kind: the kind of question, or empty for all of them.
        baseline: ``shuffled``, ``no_image``, ``lookup``, or empty for the real evaluation.
    """

    benchmark: str
    score: str
    kind: str = ""
    baseline: str = ""

    @classmethod
    def parse(cls, name: str) -> MetricKey:
        """The parts of `name`. A kind that is called like a baseline stays a kind, and the floor's name a score's."""
        benchmark, *parts = name.split("/")
        baseline = ""
        if len(parts) > 1 and parts[-1] in BESIDE and parts[-2] not in ("kind", FLOOR):
            baseline = parts.pop()
        kind = ""
        if "kind" in parts[1:-1]:
            at = parts.index("kind", 1)
            kind, parts = "/".join(parts[at + 1 :]), parts[:at]
        return cls(benchmark, "/".join(parts), kind, baseline)

    def __str__(self) -> str:
        middle = f"/kind/{self.kind}" if self.kind else ""
        return f"{self.benchmark}/{self.score}{middle}" + (f"/{self.baseline}" if self.baseline else "")


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder shows it.

    Attributes:
        folder: where it is.
        state: ``done``, ``failed``, ``running``, ``interrupted`` or ``not started``.
        reason: why it is not done, or how far it is; empty when done.
        overrides: key to value as on the command line.
        metrics: ``metrics`` of ``result.json``; empty unless done.
        cost: ``cost`` of ``result.json``.
        stale: some part of it was made by other code of the package than the present.
        other_data: its data had changed when its command was last given.
    """

    folder: Path
    state: str
    reason: str
    overrides: dict[str, str]
    metrics: dict[str, float]
    cost: dict[str, float]
    stale: bool = False
    other_data: bool = False

    @property
    def done(self) -> bool:
        """Whether there is a result to count."""
        return self.state == "done"


def read_run(folder: Path) -> RunRecord:
    """The record of a run folder, whatever is missing or broken in it."""
    result = read_json(folder / "result.json")
    metrics = numbers(result.get("metrics")) if result else {}
    state, reason = _state(folder, result, metrics)
    return RunRecord(
        folder=folder,
        state=state,
        reason=" ".join(reason.split()),
        overrides=parse_overrides(_overrides(folder, result or {})),
        metrics=metrics if state == "done" else {},
        cost=numbers(result.get("cost")) if result else {},
        stale=state == "done" and _stale(folder),
        other_data=state == "done" and bool((read_json(folder / "env.json") or {}).get(CHANGED)),
    )


def read_sweep(sweep_dir: Path) -> list[RunRecord]:
    """The cells of a sweep by name."""
    return [read_run(path) for path in cell_folders(sweep_dir)]


def cell_folders(sweep_dir: Path) -> list[Path]:
    """The folders of a sweep's cells by name; others and those kept aside by ``fresh=true`` are left out."""
    marks = ("overrides.json", "state.json", "config.yaml", "result.json")
    folders = sorted(path for path in sweep_dir.iterdir() if os.path.isdir(path)) if os.path.isdir(sweep_dir) else []
    return [p for p in folders if any(os.path.exists(p / mark) for mark in marks) and ".old-" not in p.name]


def read_record(path: Path) -> list[RunRecord]:
    """The cells of a committed record (``cells.csv``) as the runs that they were, of which no folder need be here.

    Raises:
        UserError: it is not a record, see ``read_cells``.
    """
    return [
        RunRecord(Path(row["cell"]), "done", "", parse_overrides(overrides_of(row)), metrics_of(row), cost_of(row))
        for row in read_cells(path)
    ]


def failed_run(folder: Path, overrides: Iterable[str], reason: str) -> RunRecord:
    """The record of a run that its launcher knows to have failed, though its folder may say nothing."""
    return RunRecord(folder, "failed", " ".join(reason.split()), parse_overrides(overrides), {}, {})


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """``["+a.b=1", "~c"]`` as ``{"a.b": "1", "c": "(removed)"}``."""
    pairs = ((override_key(text), text.partition("=")[2] or "(removed)") for text in overrides)
    return dict(pairs)


def numbers(value: Any) -> dict[str, float]:
    """The numeric entries of a mapping, nothing of anything else."""
    if not isinstance(value, Mapping):
        return {}
    chosen = {str(key): item for key, item in value.items() if isinstance(item, int | float)}
    return {key: float(item) for key, item in chosen.items() if not isinstance(item, bool)}


def _state(folder: Path, result: dict[str, Any] | None, metrics: dict[str, float]) -> tuple[str, str]:
    if result and result.get("failed"):
        return "failed", _unscored(result["failed"])
    if metrics:
        return "done", ""
    if (folder / "result.json").exists():
        return "failed", "result.json holds no metrics" if result else "result.json cannot be read"
    said = RunFolder(folder).state()
    where = f"stage {said.get('stage')} step {said.get('step')}" if said.get("stage") else ""
    if is_locked(folder):
        return "running", where
    state = str(said.get("state", ""))
    if state == "failed":
        return "failed", str(said.get("error") or where or "state.json gives no reason")
    if state in ("running", "interrupted"):
        error = str(said.get("error") or "")
        return "interrupted", error or (f"stopped in {where}" if where else "its process ended without a result")
    return ("failed", "done without a result.json") if state == "done" else ("not started", "")


def _unscored(failed: Any) -> str:
    """Which benchmarks of a trained run could not be scored, and why."""
    return "; ".join(f"{name}: {why}" for name, why in failed.items()) if isinstance(failed, Mapping) else str(failed)


def _overrides(folder: Path, result: dict[str, Any]) -> list[str]:
    """Overrides of a cell from whichever of its files has them."""
    for read in (
        lambda: read_yaml(folder / "overrides.json"),
        lambda: result["overrides"],
        lambda: RunFolder(folder).env()["overrides"],
        lambda: read_yaml(folder / ".hydra" / "overrides.yaml"),
    ):
        try:
            found = read()
        except (OSError, KeyError, ValueError, RecursionError, UserError, yaml.YAMLError):
            continue
        if isinstance(found, list):
            return [str(item) for item in found]
    return []


def _yaml(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None


def _stale(folder: Path) -> bool:
    try:
        return RunFolder(folder).by_other_code()
    except (UserError, OSError, ValueError):
        return True

"""Which validation of a stage was the best, and when a stage has gone on long enough without a better one.

Both are functions of the rows in ``metrics.jsonl``, so that a run which was killed and goes on decides as one which
was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from vlmlab.analyse.steps import number
from vlmlab.runs.files import read_json
from vlmlab.runs.folder import BEST_FACTS

Look = tuple[int, float]
"""Optimizer steps done in the stage, and the number that was seen."""


@dataclass(frozen=True)
class Choice:
    """By what the best validation is chosen.

    Attributes:
        monitor: a validation score, as ``held_out/loss``; also ``held_out/gap``, shuffled less right.
        mode: whether a smaller ("min") or a larger one ("max") is better.
        patience: a stage ends after so many validations in a row without a better one; None: it never ends early.
        min_delta: least difference that counts as better there.
        save: whether the weights of the best validation are kept.
    """

    monitor: str
    mode: Literal["min", "max"]
    patience: int | None = None
    min_delta: float = 0.0
    save: bool = False

    @classmethod
    def of(cls, cfg: DictConfig) -> Choice | None:
        """What the keys of ``evaluation`` say; None where nothing is chosen."""
        keys = cfg.get("evaluation") or OmegaConf.create({})
        patience, save = keys.get("patience"), bool(keys.get("save_best"))
        if not keys.get("every") or (patience is None and not save):
            return None
        return cls(str(keys.monitor), keys.mode, patience, float(keys.get("min_delta") or 0.0), save)

    def value(self, row: Mapping[str, Any]) -> float | None:
        """Its number in a row of ``metrics.jsonl``; None where the row has none."""
        return number(row, self.monitor)

    def better(self, new: float, old: float, by: float = 0.0) -> bool:
        """Whether a number is better than another by more than `by`; no number is better than none."""
        if not math.isfinite(new) or not math.isfinite(old):
            return math.isfinite(new)
        return new < old - by if self.mode == "min" else new > old + by

    def best(self, looks: Iterable[Look]) -> Look | None:
        """The best validation, of equal ones the first."""
        found: Look | None = None
        for look in looks:
            if found is None or self.better(look[1], found[1]):
                found = look
        return found

    def ends(self, looks: Iterable[Look]) -> bool:
        """Whether the stage is over, as Lightning's EarlyStopping counts."""
        if self.patience is None:
            return False
        best, waited = math.nan, 0
        for _, value in looks:
            better = self.better(value, best, self.min_delta)
            best, waited = (value, 0) if better else (best, waited + 1)
            if waited >= self.patience:
                return True
        return False


def looks_of(rows: Iterable[Mapping[str, Any]], choice: Choice, stage: str, done: int) -> list[Look]:
    """The validations of a stage up to a step, in order."""
    of_stage = [row for row in rows if row.get("stage") == stage and not row.get("finished")]
    found = [(int(row["step"]), value) for row in of_stage if (value := choice.value(row)) is not None]
    return [look for look in found if look[0] <= done]


def kept_since(home: Path, choice: Choice) -> int | None:
    """From which step on the best look of a stage has been kept; None where none was, or by another number.

    Args:
        home: the stage's folder.
        choice: what it is known by now.
    """
    facts = read_json(home / BEST_FACTS) or {}
    same = facts.get("monitor") == choice.monitor and facts.get("mode") == choice.mode
    since = facts.get("since")
    return since if same and isinstance(since, int) else None

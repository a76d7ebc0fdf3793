"""Loggers beside ``metrics.jsonl``: each gets every row once, also where the run is killed and resumed.

A run that is killed does some steps again and writes their rows again. ``logged.json`` in the run folder says how far
each logger has got, so that these rows are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import UserError, reason
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs.files import read_json, write_json
from vlmlab.runs.folder import RunFolder
from vlmlab.train.summary_logger import SummaryLogger

LOGGED = "logged.json"
LOOKS = ("held_out/", "slice/")
"""How the names of validation numbers begin."""


class ExtraLoggers:
    """The loggers of a run beside its folder.

    Args:
        cfg: the configuration; ``logger`` says which.
        folder: of the run.
        writes: whether this process is rank 0, the only one that has any.

    Attributes:
        loggers: Lightning's.

    Raises:
        UserError: a logger cannot be made, as where its package is missing.
    """

    def __init__(self, cfg: DictConfig, folder: RunFolder, writes: bool) -> None:
        self.file, self.stages = folder.path / LOGGED, parse(cfg)
        self.loggers: list[Logger] = loggers_of(cfg, folder) if writes else []
        self._told: dict[str, dict[str, list[int]]] = (read_json(self.file) or {}) if self.loggers else {}

    def log(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Hand on those rows of ``metrics.jsonl`` that a logger has not had: of training steps and of validations."""
        for row in rows if self.loggers else ():
            kind = kind_of(row)
            stage = next((stage for stage in self.stages if stage.name == row.get("stage")), None)
            if kind is None or stage is None or not isinstance(row.get("step"), int):
                continue
            numbers = {key: value for key, value in row.items() if _is_number(value) and key != "step"}
            shown = {f"train/{key}": value for key, value in numbers.items()} if kind == "train" else numbers
            step, samples = position(self.stages, stage, int(row["step"]))
            for logger in self.loggers:
                told, now = self._told.setdefault(type(logger).__name__, {}), [stage.index, int(row["step"])]
                if told.get(kind, [-1]) >= now:
                    continue
                told[kind] = now
                write_json(self.file, self._told)  # first: a row that is lost is in metrics.jsonl, one twice is wrong
                logger.log_metrics(shown | {"samples": float(samples)}, step)

    def finish(self, cfg: DictConfig, folder: Path, metrics: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """The end of a run: its scores and costs, as a summary where a logger has one."""
        last = position(self.stages, self.stages[-1], self.stages[-1].steps)[0]
        scores = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        costs = {f"cost/{key}": float(value) for key, value in cost.items() if _is_number(value)}
        for logger in self.loggers:
            if isinstance(logger, SummaryLogger):
                logger.summarise(cfg, folder, scores, costs)
            else:
                logger.log_metrics(scores | costs, last)

    def close(self, code: int) -> None:
        """Finish all loggers, or the next run in this process would write into them.

        Args:
            code: the exit code of the run.
        """
        for logger in self.loggers:
            if isinstance(logger, SummaryLogger):
                logger.end(code)
            else:
                logger.finalize("success" if code == 0 else "failed")
        self.loggers = []


def loggers_of(cfg: DictConfig, folder: RunFolder) -> list[Logger]:
    """The loggers that ``logger`` says.

    Raises:
        UserError: one cannot be made.
    """
    if cfg.logger.get("name") == "wandb":
        from vlmlab.train.wandb_run import WandbRun

        return [WandbRun(cfg, folder)]
    node = cfg.logger.get("make")
    if node is None:
        return []
    described = OmegaConf.to_container(node, resolve=True)
    assert isinstance(described, dict)
    if described.get("save_dir", "") is None:
        described["save_dir"] = str(folder.path)
    target = described.get("_target_")
    try:
        made = instantiate(described)
    except InstantiationException as error:
        cause = error.__cause__ or error
        missing = isinstance(cause, ImportError)
        why = "its package is not installed" if missing else reason(cause)
        remedy = "install it, or choose another logger" if missing else "correct its keys"
        raise UserError(f"logger.make._target_={target}: {why} ({reason(cause, 120)}); {remedy}.") from error
    if not isinstance(made, Logger):
        raise UserError(f"logger.make._target_={target} is not a Lightning logger; give one.")
    return [made]


def kind_of(row: Mapping[str, Any]) -> str | None:
    """``train`` or ``look``; None of rows that no logger gets."""
    if "loss" in row:
        return "train"
    return "look" if any(key.startswith(LOOKS) for key in row) else None


def position(stages: Sequence[Stage], stage: Stage, done: int) -> tuple[int, int]:
    """Optimizer steps, and samples seen, over all stages up to a step of one."""
    before = [other for other in stages if other.index < stage.index]
    return (
        sum(other.steps for other in before) + done,
        sum(other.steps * other.batch_size for other in before) + done * stage.batch_size,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

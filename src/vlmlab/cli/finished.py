"""The run that a command's ``run`` names. Free of torch, so that a mistake is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.runs.folder import RunFolder


def finished_run(cfg: DictConfig, example: str) -> Path:
    """The folder of a finished run.

    Args:
        cfg: the command's configuration, with ``run``.
        example: a command that names one.

    Raises:
        ConfigError: ``run`` is missing or no folder of a run.
        CheckpointError: the run is damaged or not finished.
    """
    folder = known_run(cfg, example)
    RunFolder(folder).finished()
    return folder


def known_run(cfg: DictConfig, example: str) -> Path:
    """The folder of a run, finished or not; arguments and errors as for ``finished_run``."""
    if OmegaConf.is_missing(cfg, "run"):
        raise ConfigError(f"which run? write run=<folder>, as in: {example}")
    folder = Path(str(cfg.run))
    if _config(folder) is None:
        raise ConfigError(
            f"run={folder} is no run folder (it has no config.yaml); give the folder that training printed"
        )
    return folder


def _config(folder: Path) -> dict[str, Any] | None:
    """The run's configuration, or None where there is no run; whoever reads a run can only restore a damaged one."""
    try:
        return RunFolder(folder).config()
    except UserError as error:
        cause = error.__cause__
        mark = getattr(cause, "problem_mark", None)
        why = f"line {mark.line + 1}: {getattr(cause, 'problem', cause)}" if mark else "it is no configuration"
        raise CheckpointError(
            f"{folder / 'config.yaml'} is damaged ({why}); restore it, or train the run again"
        ) from error

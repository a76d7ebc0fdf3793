"""The run that a command's ``run`` names. Free of torch, so that a mistake is answered at once."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.entry import ConfigError
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
    if RunFolder(folder).config() is None:
        raise ConfigError(
            f"run={folder} is no run folder (it has no config.yaml); give the folder that training printed"
        )
    return folder


def trusted(cfg: DictConfig) -> bool:
    """Whether code from outside vlmlab that the run names may be run.

    Raises:
        ConfigError: ``trust`` is neither true nor false.
    """
    if not isinstance(cfg.trust, bool):
        raise ConfigError(f"trust={cfg.trust} is not possible; give true or false")
    return cfg.trust

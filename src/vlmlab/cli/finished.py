"""The run that a command's ``run`` names. Free of torch, so that a mistake is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules.words import unread
from vlmlab.contracts.values import hints, refusal
from vlmlab.runs.folder import RunFolder, of_transformers


def finished_run(cfg: DictConfig, example: str) -> Path:
    """The folder of a finished run.

    Args:
        cfg: the command's configuration, with ``run``.
        example: a command that names one.

    Raises:
        ConfigError: ``run`` is missing or no folder of a run.
        CheckpointError: the run is damaged or not finished.
    """
    return finished_folder(named_run(cfg, example))


def finished_folder(given: object) -> Path:
    """The folder of a finished run, as it is given; errors as for ``finished_run``."""
    folder = known_folder(given)
    RunFolder(folder).finished()
    return folder


def known_run(cfg: DictConfig, example: str) -> Path:
    """The folder of a run, finished or not; arguments and errors as for ``finished_run``."""
    return known_folder(named_run(cfg, example))


def named_run(cfg: DictConfig, example: str) -> Any:
    """What ``run`` is given.

    Raises:
        ConfigError: nothing.
    """
    if OmegaConf.is_missing(cfg, "run"):
        raise ConfigError(f"which run? write run=<folder>, as in: {example}")
    return cfg.run


def known_folder(given: object) -> Path:
    """The folder of a run, finished or not, as it is given; errors as for ``known_run``."""
    folder = Path(str(given))
    if (sentence := of_transformers(RunFolder(folder))) is not None:
        raise ConfigError(sentence)
    if RunFolder(folder).config() is None:
        raise ConfigError(
            f"run={folder} is not a run folder (it has no config.yaml); give the folder that training printed"
        )
    return folder


def check_own(cfg: DictConfig, section: Any) -> None:
    """Refuse a value that a key of the command cannot have; one that is missing is asked for by name where it is used.

    Args:
        cfg: the command's configuration.
        section: its keys, as ``vlmlab.cli.rules.schema`` has them.

    Raises:
        ConfigError: the first key that is not there or has such a value.
    """
    known = hints(section)
    for key in cfg:
        if key not in known:  # added by +key=..., and nothing would read it
            raise ConfigError(unread(str(key), known))
    for key, kind in known.items():
        if OmegaConf.is_missing(cfg, key):
            continue
        if key not in cfg:
            raise ConfigError(f"{key} is needed here; leave ~{key} out")
        try:
            value = OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key} cannot be resolved: {str(error).splitlines()[0]}; give it a value") from error
        if (sentence := refusal(kind, value, key)) is not None:
            raise ConfigError(sentence)


def trusted(cfg: DictConfig) -> bool:
    """Whether code from outside vlmlab that the run names may be run.

    Raises:
        ConfigError: ``trust`` is neither true nor false.
    """
    if not isinstance(cfg.trust, bool):
        raise ConfigError(f"trust={cfg.trust} is not possible; give true or false")
    return cfg.trust

"""The export command: ``vlmlab export run=... to=...`` puts a finished run into others' hands."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own, finished_run, trusted
from vlmlab.cli.rules.schema import Export
from vlmlab.contracts.terminal import tell
from vlmlab.runs.files import is_free
from vlmlab.runs.trust import saved_config

EXAMPLE = "vlmlab export run=outputs/default to=exported"


def export_command(cfg: DictConfig) -> None:
    """Write the folders and files, and say what they are.

    Raises:
        ConfigError: ``run`` or ``to`` is missing, ``run`` is not a folder of a run, or ``to`` has files in it.
        CheckpointError: the run is not finished, or its files do not fit.
    """
    check_own(cfg, Export)
    folder = finished_run(cfg, EXAMPLE)
    if OmegaConf.is_missing(cfg, "to"):
        raise ConfigError(f"where to? write to=<folder>, as in: {EXAMPLE}")
    to = Path(str(cfg.to))
    if not is_free(to):
        raise ConfigError(f"to={to} has files in it; give a new or empty folder")
    if not trusted(cfg):
        saved_config(folder)  # refused before torch is imported
    from vlmlab.export import export  # from here on torch

    hub = None if cfg.hub is None else str(cfg.hub)
    for part, path in export(folder, to, trusted(cfg), cfg.form, hub).items():
        tell(f"{part:<10} {path}")


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="export", version_base="1.3")(guard(export_command))
    sys.exit(run_command(main, conf, "export"))

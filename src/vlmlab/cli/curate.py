"""The curate command: ``vlmlab curate run=... out=...`` has a finished run look at captions of its own data."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own, finished_run, trusted
from vlmlab.cli.rules.schema import Curate
from vlmlab.runs.files import check_place
from vlmlab.runs.trust import saved_config

EXAMPLE = "vlmlab curate run=outputs/default out=scores.jsonl"


def curate_command(cfg: DictConfig) -> None:
    """Score the captions, write the file and say what was found.

    Raises:
        ConfigError: ``run`` or ``out`` is missing, ``run`` is not a folder of a run, or ``out`` cannot be written.
        CheckpointError: the run is not finished, or its files do not fit.
        UserError: the source is none of the run's, or none of captions.
    """
    check_own(cfg, Curate)
    folder = finished_run(cfg, EXAMPLE)
    if OmegaConf.is_missing(cfg, "out"):
        raise ConfigError(f"where to? write out=<file>, as in: {EXAMPLE}")
    check_place(Path(str(cfg.out)), "out")
    if not trusted(cfg):
        saved_config(folder)  # refused before torch is imported
    from vlmlab.evaluate.curation import curate_run  # from here on torch

    curate_run(folder, cfg)


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="curate", version_base="1.3")(guard(curate_command))
    sys.exit(run_command(main, conf, "curate"))

"""The evaluate command. ``python -m vlmlab.cli.evaluate`` is ``python evaluate.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.runs.folder import RunFolder


def evaluate_command(cfg: DictConfig) -> None:
    """Score a finished run again, from its checkpoint.

    Raises:
        ConfigError: ``run`` is missing, or no folder of a run.
    """
    if OmegaConf.is_missing(cfg, "run"):
        raise ConfigError("which run? write run=<folder>, as in: python evaluate.py run=outputs/default")
    folder = Path(str(cfg.run))
    if RunFolder(folder).config() is None:
        raise ConfigError(
            f"run={folder} is no run folder (it has no config.yaml); give the folder that training printed"
        )
    from vlmlab.evaluate.run import evaluate  # from here on torch

    evaluate(folder, cfg)


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="evaluate", version_base="1.3")(guard(evaluate_command))
    sys.exit(run_command(main, conf, "evaluate"))

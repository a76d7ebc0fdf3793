"""The evaluate command. ``python -m vlmlab.cli.evaluate`` is ``python evaluate.py``."""

from __future__ import annotations

import re
import sys

import hydra
from omegaconf import DictConfig

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import finished_run


def evaluate_command(cfg: DictConfig) -> None:
    """Score a finished run again, from its checkpoint.

    Raises:
        ConfigError: ``run`` is missing or no folder of a run, or a key has a value it cannot have.
        CheckpointError: the run is not finished.
    """
    folder = finished_run(cfg, "python evaluate.py run=outputs/default")
    _check_values(cfg)
    from vlmlab.evaluate.run import evaluate  # from here on torch

    if str(cfg.device).startswith("cuda"):
        _check_gpu(str(cfg.device))
    evaluate(folder, cfg)


def _check_values(cfg: DictConfig) -> None:
    """Sizes are counts, switches are on or off, the device is one, and a single benchmark's name is a list of it."""
    for key in ("limit", "batch_size"):
        value = cfg[key]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key}={value} is not possible; give a whole number of at least 1, or null")
    if not (cfg.share_images is None or isinstance(cfg.share_images, bool)):
        raise ConfigError(f"share_images={cfg.share_images} is unknown; choose true or false, or null")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(cfg.device)):
        raise ConfigError(f"device={cfg.device} is unknown; choose one of auto, cpu, cuda")
    if isinstance(cfg.benchmarks, str):
        cfg.benchmarks = [cfg.benchmarks]


def _check_gpu(device: str) -> None:
    import torch

    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device={device} is not there ({torch.cuda.device_count()} GPUs); choose device=cpu or auto")


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="evaluate", version_base="1.3")(guard(evaluate_command))
    sys.exit(run_command(main, conf, "evaluate"))

"""The evaluate command. ``python -m vlmlab.cli.evaluate`` is ``python evaluate.py``."""

from __future__ import annotations

import re
import sys

import hydra
from omegaconf import DictConfig

from vlmlab.analyse.table import final_table
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own, known_run, trusted
from vlmlab.cli.rules.schema import Evaluate
from vlmlab.cli.train import train_in
from vlmlab.contracts.terminal import tell
from vlmlab.contracts.values import shown
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder, is_whole
from vlmlab.runs.trust import saved_config
from vlmlab.runs.withheld import stored


def evaluate_command(cfg: DictConfig) -> None:
    """Score a run from its checkpoint: a finished one again; one whose training alone is done is finished by it.

    Raises:
        ConfigError: ``run`` is missing or no folder of a run, or a key has a value it cannot have.
        CheckpointError: the run is not trained to its end.
    """
    _check_values(cfg)
    folder = known_run(cfg, "python evaluate.py run=outputs/default")
    run = RunFolder(folder)
    left = run.trained() and not is_whole(run.result())
    if not left:
        run.finished()
    if not trusted(cfg):
        saved_config(folder)  # refused before torch is imported
    if str(cfg.device).startswith("cuda"):
        _check_gpu(str(cfg.device))
    if left:
        _finish(cfg, run)
        return
    from vlmlab.evaluate.run import evaluate  # from here on torch

    evaluate(folder, cfg)


def _finish(cfg: DictConfig, run: RunFolder) -> None:
    """Score what the run's own evaluation has left, with what this one asks for, and write its result."""
    from vlmlab.evaluate.run import overridden

    config = overridden(saved_config(run.path, trusted(cfg)), cfg)
    if cfg.device != "auto":
        config.trainer.accelerator = "cpu" if cfg.device == "cpu" else "gpu"
        _take_gpu(str(cfg.device))
    with run:
        run.open(plain(config), run.env().get("overrides", []), written=stored(config))
        result = train_in(run, config)
    tell(final_table(result or {}, run.path))


def _check_values(cfg: DictConfig) -> None:
    """Sizes are counts, switches are on or off, the device is one, and a single benchmark's name is a list of it."""
    check_own(cfg, Evaluate)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(cfg.device)):
        raise ConfigError(f"device={shown(cfg.device)} is unknown; choose one of auto, cpu, cuda")
    if isinstance(cfg.benchmarks, str):
        cfg.benchmarks = [cfg.benchmarks]


def _check_gpu(device: str) -> None:
    import torch

    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device={device} is not there ({torch.cuda.device_count()} GPUs); choose device=cpu or auto")


def _take_gpu(device: str) -> None:
    if ":" in device:
        import torch

        torch.cuda.set_device(device)


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="evaluate", version_base="1.3")(guard(evaluate_command))
    sys.exit(run_command(main, conf, "evaluate"))

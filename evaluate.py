"""Score a finished run again, from its checkpoint: ``python evaluate.py run=outputs/<name>``."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from vlmlab.cli.entry import guard, run_command
from vlmlab.cli.evaluate import evaluate_command


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
@guard
def main(cfg: DictConfig) -> None:
    """Load the run's checkpoint and score its benchmarks."""
    evaluate_command(cfg)


if __name__ == "__main__":
    sys.exit(run_command(main, Path(__file__).resolve().parent / "conf", "evaluate"))

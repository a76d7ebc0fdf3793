"""Train and score one vision-language model, or sweep several.

    python train.py                                              the embedded default: minutes, CPU, offline
    python train.py connector=qformer mask=causal seed=1         another composition (folders of conf/)
    python train.py -m connector=mlp,qformer mask=bidir,causal   a sweep: one process per cell, then its table
    python train.py --help                                       the groups and their choices

What happens, in order, and where to read it:

    conf/train.yaml           composes the configuration from one file per choice
    vlmlab/cli/rules/         refuses combinations that cannot work, before torch is imported
    vlmlab/runs/folder.py     finished, resumed or new: decides by the run's folder, outputs/<name>
    vlmlab/train/run.py       builds the model and trains the recipe's stages, then scores the benchmarks
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from vlmlab.cli.entry import guard, run_command
from vlmlab.cli.train import train_command


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
@guard
def main(cfg: DictConfig) -> None:
    """Check the composition, open the run's folder, train what is left to train, print the result."""
    train_command(cfg)


if __name__ == "__main__":
    sys.exit(run_command(main, Path(__file__).resolve().parent / "conf", "train"))

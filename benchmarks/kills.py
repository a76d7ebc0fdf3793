"""Runs that are killed at random moments, over and over, against one that is left alone: the same bits or not.

    python benchmarks/kills.py [--kills 200] [--each 10] [--seed 0] [preset=... trainer.workers=1 ...]

A run is the composed one with few steps of few samples (see ``SMALL``), trained and scored in a process of its own that
is forked from one that has only imported. It is sent SIGKILL after a time drawn evenly from 0 to the time that the
uninterrupted run took, started again, and so on for ``--each`` kills; then it may end. Its weights after every stage
and its scores are compared with those of the uninterrupted run, bit by bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file

from vlmlab.runs import places as places  # registers the resolvers
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("coarse_align", "deep_align", "caption_pretrain", "instruction_tune")
SMALL = (
    "budget=test",
    "budget.max_steps=10",
    "budget.eval_limit=2",
    "trainer.save_every_s=0",
    "trainer.progress=false",
    "trainer.accelerator=cpu",
    *(f"recipe.stages.{name}.batch_size=4" for name in STAGES),
)


def main() -> None:
    """Print a line for every run and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of all runs together")
    parser.add_argument("--each", type=int, default=10, help="kills of a run before it may end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*SMALL, *given.overrides])
    with tempfile.TemporaryDirectory() as place:
        _campaign(cfg, Path(place), given.kills, given.each, random.Random(given.seed))


def _campaign(cfg: DictConfig, place: Path, kills: int, each: int, draw: random.Random) -> None:
    began = time.monotonic()
    _end(cfg, place / "whole")
    took = time.monotonic() - began
    print(f"left alone: {took:.1f} s", flush=True)
    done, runs, other = 0, 0, 0
    while done < kills:
        folder = place / f"killed-{runs}"
        where = _killed(cfg, folder, [draw.random() * took for _ in range(min(each, kills - done))])
        _end(cfg, folder)
        different = _different(place / "whole", folder)
        done, runs, other = done + len(where), runs + 1, other + bool(different)
        found = f"{len(different)} differ, first {different[0]}" if different else "the same bits"
        moments = ", ".join(f"{name} {count}" for name, count in Counter(where).items())
        print(f"run {runs}: {len(where)} kills ({moments}): {found}", flush=True)
        if not where:
            break
    print(f"{done} kills over {runs} runs, {other} of which ended with other bits")


def _killed(cfg: DictConfig, folder: Path, moments: Sequence[float]) -> list[str]:
    """Kill a run at each of these times after a start; where it was each time. It may end before the last ones."""
    where = []
    for moment in moments:
        process = _started(cfg, folder)
        process.join(moment)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            state = RunFolder(folder).state()
            where.append(str(state.get("stage") or "the beginning"))
        elif RunFolder(folder).result() is not None:
            break
    return where


def _end(cfg: DictConfig, folder: Path) -> None:
    process = _started(cfg, folder)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run in {folder} ended with code {process.exitcode}")


def _started(cfg: DictConfig, folder: Path) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=_train, args=(cfg, folder))
    process.start()
    return process


def _train(cfg: DictConfig, folder: Path) -> None:
    """As the command does, and silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with RunFolder(folder) as run:
        if run.open(plain(cfg)) is None:
            train(cfg, folder)


def _different(whole: Path, other: Path) -> list[str]:
    """Tensors and scores that are not the same."""
    found = []
    for file in sorted(whole.glob("stages/*/model.safetensors")):
        ours, theirs = load_file(file), load_file(other / file.relative_to(whole))
        found += [f"{file.parent.name}: {name}" for name in ours if not torch.equal(ours[name], theirs[name])]
    scores: list[Any] = [(RunFolder(folder).result() or {}).get("metrics") for folder in (whole, other)]
    return found + (["scores"] if scores[0] != scores[1] else [])


if __name__ == "__main__":
    main()

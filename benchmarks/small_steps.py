"""What a small model's step on a CPU does besides its mathematics: Muon in bfloat16, and rows that are padded.

    python benchmarks/small_steps.py [--rounds 7] [preset=testbed ...]

- Muon: one step of torch's and of ``vlmlab.engine.optim.CpuMuon`` on the hidden matrices of the composed LM; CPU time
  of the process, the two take turns, median of the ratios with quartiles.
- packing: of the first batches of every stage, the share of a batch's positions that hold a token: each sample a row,
  packed by first fit in the given order, and as the collator packs. Counted, not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.optim import Muon, Optimizer

from vlmlab.data.collate import pack
from vlmlab.engine.optim import CpuMuon, hidden_matrices
from vlmlab.engine.restore import module_class, new_staged_model
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs import names as names  # registers the resolvers

ROOT = Path(__file__).resolve().parents[1]
BATCHES = 6


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", help="of train.py")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", given.overrides)
    _print_muon(cfg, given.rounds)
    _print_packing(cfg)


def _print_muon(cfg: DictConfig, rounds: int) -> None:
    lm = instantiate(cfg.lm)
    chosen = hidden_matrices(lm)
    shapes = [p.shape for p in lm.parameters() if id(p) in chosen]
    steps = [_step(kind, shapes) for kind in (CpuMuon, Muon)]
    times = np.array([[_cpu(step) for step in steps] for _ in range(rounds)])  # (R, 2)
    low, middle, high = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.5, 0.75))
    ours, theirs = np.median(times, 0)
    print(f"Muon, {len(shapes)} matrices, {sum(s.numel() for s in shapes):,} weights:")
    print(f"  float32 {ours * 1e3:.0f} ms, torch's {theirs * 1e3:.0f} ms, ratio {middle:.3f} ({low:.3f} to {high:.3f})")


def _step(kind: type[Muon], shapes: Sequence[torch.Size]) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer: Optimizer = kind(parameters, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    optimizer.step()  # makes its state
    return optimizer.step


def _cpu(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def _print_packing(cfg: DictConfig) -> None:
    limit = cfg.collate.pack_length
    print(f"\nfilled positions of a batch, rows of at most {limit}:")
    print(f"  {'stage':<18} {'tokens a sample':>15} {'a row each':>11} {'first fit':>10} {'as packed':>10}")
    for stage in parse(cfg):
        lengths = _lengths(cfg, stage)
        filled = [
            _filled(lengths, way) for way in (_alone, lambda some: _in_order(some, limit), lambda s: pack(s, limit))
        ]
        mean = np.mean([length for batch in lengths for length in batch])
        print(
            f"  {stage.name:<18} {mean:>15.0f} "
            + " ".join(f"{v:>{w}.3f}" for v, w in zip(filled, (11, 10, 10), strict=True))
        )


def _lengths(cfg: DictConfig, stage: Stage) -> list[list[int]]:
    """Tokens of every sample, batch by batch."""
    kind = module_class(stage)
    collate = kind.collator(cfg, new_staged_model(cfg, kind.build).model, stage.prompt or kind.prompt)
    source = instantiate(cfg.data.train[stage.data])
    size = stage.batch_size
    batches = [range(k * size, (k + 1) * size) for k in range(BATCHES)]
    return [[len(part.ids) for i in batch for part in collate.encode(source[i])] for batch in batches]


def _alone(lengths: list[int]) -> list[list[int]]:
    return [[i] for i in range(len(lengths))]


def _in_order(lengths: list[int], limit: int) -> list[list[int]]:
    """Each sample into the first row with room for it."""
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        row = next((row for row in rows if sum(lengths[k] for k in row) + length <= limit), None)
        if row is None:
            rows.append([i])
        else:
            row.append(i)
    return rows


def _filled(batches: list[list[int]], way: Callable[[list[int]], list[list[int]]]) -> float:
    used = 0
    for lengths in batches:
        rows = way(lengths)
        used += len(rows) * max(sum(lengths[i] for i in row) for row in rows)
    return sum(map(sum, batches)) / used


if __name__ == "__main__":
    main()

"""SigLIP's loss over several ranks by the ring is that of one rank with all rows: values and all gradients."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from tests.tiny import worst
from torch import Tensor
from torch import distributed as dist

from vlmlab.contracts.tensors import Batch, Outputs, Pairing
from vlmlab.objective.siglip import Siglip

NONE: Batch = None  # type: ignore[assignment]
ROWS = 3


def pairing(rows: Tensor) -> Pairing:
    """Rows (B, 2, E) of images and texts; scale and bias are leaves."""
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (1.5, -2.0))
    return Pairing(rows[:, 0], rows[:, 1], scale, bias)


def rows(rank: int) -> Tensor:
    return torch.randn(ROWS, 2, 4, generator=torch.Generator().manual_seed(rank))


def values(mine: Tensor) -> list[Any]:
    pair = pairing(mine)
    total, count = Siglip()(Outputs(torch.zeros(0, 1), torch.zeros(0), pairing=pair), NONE)["siglip"]
    total.backward()
    assert mine.grad is not None and pair.log_scale.grad is not None and pair.bias.grad is not None
    return [total.item(), count.item(), mine.grad.tolist(), pair.log_scale.grad.item(), pair.bias.grad.item()]


def one_rank(rank: int, ranks: int, file: str, results: multiprocessing.Queue[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    results.put((rank, *values(rows(rank).requires_grad_())))
    dist.barrier()
    dist.destroy_process_group()


def test_the_ring_over_ranks_is_one_rank(tmp_path: Path) -> None:
    """Three ranks, so that texts pass through a rank on their way and gradients back through it."""
    ranks, context = 3, multiprocessing.get_context("fork")
    results = context.Queue()
    running = [
        context.Process(target=one_rank, args=(r, ranks, str(tmp_path / "store"), results)) for r in range(ranks)
    ]
    for process in running:
        process.start()
    found = sorted(results.get(timeout=100) for _ in running)
    for process in running:
        process.join()
    whole = torch.cat([rows(rank) for rank in range(ranks)]).requires_grad_()
    total, count, grads, scale, bias = values(whole)
    assert abs(sum(one[1] for one in found) - total) < 1e-4 and sum(one[2] for one in found) == count == ranks * ROWS
    assert worst(torch.cat([torch.tensor(one[3]) for one in found]), torch.tensor(grads)) < 1e-5
    assert abs(sum(one[4] for one in found) - scale) < 1e-4 and abs(sum(one[5] for one in found) - bias) < 1e-4

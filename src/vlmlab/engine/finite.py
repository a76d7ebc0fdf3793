"""Whether weights are numbers, and a model looked at as it will be evaluated, with nothing changed by the look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlmlab.engine.shards import own


def nonfinite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors with a value that is not a number, or so large that their norm is none in float32.

    Of a shard only this rank's part is looked at.
    """
    return [name for name, tensor in named if tensor.is_floating_point() and not _has_norm(tensor)]


@torch.no_grad()
def _has_norm(tensor: Tensor) -> bool:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(torch.linalg.vector_norm(own(tensor.detach()), dtype=wide)))


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and afterwards every module in the mode it was in and the random state as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode

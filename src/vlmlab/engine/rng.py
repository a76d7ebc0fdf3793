"""The global random generators: seeding, and their states as tensors and lists that load with ``weights_only=True``."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def seed_all(*key: object) -> None:
    """Seed python, numpy and torch (all devices) from anything printable."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)


def state() -> dict[str, Any]:
    """The states of this process."""
    numpy_state: Any = np.random.get_state(legacy=True)
    name, words, position, has_gauss, gauss = numpy_state
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, [int(w) for w in words], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), gauss_next],
    }


def restore(saved: dict[str, Any]) -> None:
    """Set the states of this process."""
    torch.set_rng_state(saved["torch"].cpu())
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].cpu())
    name, words, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), position, has_gauss, gauss))
    version, numbers, gauss_next = saved["python"]
    random.setstate((version, tuple(numbers), gauss_next))


def states_of_all_ranks() -> list[dict[str, Any]]:
    """The states of every rank, in order; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, state())
    return found

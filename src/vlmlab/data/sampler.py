"""Which samples an optimizer step sees: a pure function of seed, stage and step. Never imports torch."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Order:
    """Shuffled passes over a data set, one after the other, cut into optimizer steps.

    A step's samples do not depend on the number of ranks, micro-batches or workers; only who gets which does.

    Args:
        size: samples in the data set.
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        seed: the run's seed.
        stage: name of the stage; every stage has its own order.
        block: samples that can be shuffled among themselves, of a source that is read from its beginning to its end
            (see `vlmlab.contracts.sample.SampleSource`); None: all of them.
    """

    def __init__(self, size: int, batch_size: int, seed: int, stage: str, block: int | None = None) -> None:
        if size < 1:
            raise ValueError("an order needs at least one sample")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.stage = stage
        self.block = block or size

    def window(self, step: int) -> list[int]:
        """The ``batch_size`` indices of an optimizer step (from 0)."""
        first = step * self.batch_size
        found = []
        for place in range(first, first + self.batch_size):
            epoch, offset = divmod(place, self.size)
            begin = offset - offset % self.block
            key = f"{self.stage}/{begin}" if begin else self.stage
            order = _permutation(min(self.block, self.size - begin), self.seed, key, epoch)
            found.append(begin + int(order[offset - begin]))
        return found

    def share(self, step: int, rank: int = 0, ranks: int = 1, accumulate: int = 1) -> list[list[int]]:
        """One rank's micro-batches of a step; over all ranks and micro-batches they make up ``window(step)``."""
        window = self.window(step)
        rows = self.batch_size // (ranks * accumulate)
        starts = [(micro * ranks + rank) * rows for micro in range(accumulate)]
        return [window[start : start + rows] for start in starts]


def block_of(source: object) -> int | None:
    """The `block` of a source: as many samples as it holds at a time where it is read in order."""
    found: int | None = getattr(source, "in_blocks", None)
    return found


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, stage: str, epoch: int) -> NDArray[np.int64]:
    key = hashlib.sha256(f"{seed}/{stage}/{epoch}".encode()).digest()
    words = np.frombuffer(key, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(words)).permutation(size)

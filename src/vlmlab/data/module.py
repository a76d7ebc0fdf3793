"""From a data source to what the trainer loops over: one item is one optimizer step of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.contracts.stops import STOPS
from vlmlab.data.sampler import Order
from vlmlab.data.skipped import Skipped, next_usable

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from vlmlab.contracts.tensors import Batch


@dataclass(frozen=True)
class Window:
    """One rank's part of an optimizer step: all its micro-batches, so that what a loss divides by is known first.

    Attributes:
        step: the optimizer step, from 0.
        batches: ``accumulate`` micro-batches.
        error: what is wrong with the data; raised by the trainer, on every rank (a worker cannot raise it whole).
        skipped: the bad samples that others replace.
    """

    step: int
    batches: list[Batch]
    error: UserError | None = None
    skipped: tuple[Skipped, ...] = ()

    def to(self, device: Any) -> Window:
        """The same window on another device."""
        return replace(self, batches=[batch.to(device) for batch in self.batches])


class Windows:
    """A map-style data set: item k is the ``Window`` of optimizer step k.

    Args:
        source: the samples.
        collate: samples to a micro-batch.
        order: which samples a step sees.
        steps: number of optimizer steps.
        rank: this process among `ranks`.
        ranks: processes that share every step.
        accumulate: micro-batches per step and rank.
        replace: the next usable sample replaces one that cannot be loaded, is too long or has nothing to learn.
    """

    def __init__(
        self,
        source: SampleSource,
        collate: Callable[[list[Sample]], Batch],
        order: Order,
        steps: int,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        replace: bool = False,
    ) -> None:
        self.source, self.collate, self.order, self.steps = source, collate, order, steps
        self.rank, self.ranks, self.accumulate, self.replace = rank, ranks, accumulate, replace

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Window:
        shares = self.order.share(step, self.rank, self.ranks, self.accumulate)
        skipped: list[Skipped] = []
        try:
            batches = [self._batch(share, skipped) for share in shares]
        except UserError as error:
            return Window(step, [], error, tuple(skipped))
        return Window(step, batches, None, tuple(skipped))

    def _batch(self, share: list[int], skipped: list[Skipped]) -> Batch:
        if self.replace:
            try:
                return self.collate([self.source[index] for index in share])
            except DataError:  # which sample it is shows one at a time; rare, so that the good case costs nothing
                samples = [next_usable(self.source, index, self._check, skipped) for index in share]
                return self.collate(samples)
        return self.collate([self.source[index] for index in share])

    def _check(self, sample: Sample) -> object:
        return self.collate([sample])


def step_loader(windows: Windows, start: int = 0, workers: int = 0) -> DataLoader[Window]:
    """The windows of steps `start` and later, in order; the same for any number of workers."""
    import torch
    from torch.utils.data import DataLoader

    return DataLoader(
        windows,  # type: ignore[arg-type]  # anything with __getitem__ and __len__
        batch_size=None,
        sampler=range(start, len(windows)),
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batch_size it gets one item
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # worker seeds must not be drawn from the global generator
    )


def _as_it_is(window: Window) -> Window:
    return window


def _quiet_worker(_: int) -> None:
    """One thread, and no reaction to signals: the trainer saves first and stops its workers itself."""
    import signal

    import torch

    torch.set_num_threads(1)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)

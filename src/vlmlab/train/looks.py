"""What a stage's visual tokens say of the image before the first step: a connector that starts blind is seen here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L
import torch
from torch import Tensor

from vlmlab.cache.none import NoCache
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.contracts.tensors import Batch
from vlmlab.data.sampler import Order
from vlmlab.engine.finite import as_evaluated
from vlmlab.model.vlm import VLM

IMAGES = 32
"""Images that are looked at, at most."""


def differing_share(tokens: Tensor) -> float:
    """Share of the visual tokens' variance that differs between images, in 0..1.

    Tokens (I, M, D) vary from place to place and from image to image; the mean over places and widths of the variance
    over images, divided by that of the variance over images and places. 0: every image gives the same tokens.
    """
    tokens = tokens.float()
    between = tokens.var(0, correction=0).mean()
    total = tokens.flatten(0, 1).var(0, correction=0).mean()
    return float(between / total) if float(total) > 0 else 0.0


class Looks(L.Callback):
    """Says before a stage's first step how much its visual tokens differ between images.

    Args:
        source: the stage's samples.
        order: the stage's; the samples of its first steps are looked at.
        collate: makes a batch.
        say: takes the line.
    """

    def __init__(
        self,
        source: SampleSource,
        order: Order,
        collate: Callable[[list[Sample]], Batch],
        say: Callable[[str], None],
    ) -> None:
        self.source, self.order, self.collate, self.say = source, order, collate, say

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look, on rank 0, unless the stage goes on from a checkpoint, or a cache counts who reads it."""
        model = module.model
        if trainer.global_rank or getattr(module, "done", 0) or not isinstance(model, VLM):
            return
        if not isinstance(model.cache, NoCache):
            return
        seen = []
        with as_evaluated(model), trainer.precision_plugin.forward_context():
            for batch in self._batches():
                tokens = model.see(batch.to(module.device)).tokens
                if tokens is not None:
                    seen.append(tokens)
        if sum(map(len, seen)) > 1:
            share = differing_share(torch.cat(seen))
            self.say(f"visual tokens: {share:.3f} of their variance differs between images ({sum(map(len, seen))})")

    def _batches(self) -> Iterator[Batch]:
        """The first usable rows, one by one; others are for whoever loads the windows to write down."""
        images = 0
        for index in self.order.window(0):
            try:
                batch = self.collate([self.source[index]])
            except UserError:
                continue
            images += len(batch.pixels)
            yield batch
            if images >= IMAGES:
                return

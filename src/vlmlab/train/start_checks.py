"""Checks before a stage's first step: the prompts of generation, and how much visual tokens depend on the image.

They show a prompt that is not the beginning of what is learnt, and a connector that starts blind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vlmlab.cache.none import NoCache
from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.contracts.tensors import Batch
from vlmlab.data.asking import check_prompt
from vlmlab.data.collate import Collator
from vlmlab.data.sampler import Order
from vlmlab.engine.finite import as_evaluated
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM

IMAGES = 32
"""Images that are looked at, at most."""

PROVED = 8
"""Rows whose prompts are held against what is learnt."""


def check_prompts(cfg: DictConfig, model: nn.Module, collate: object, source: SampleSource, order: Order) -> list[str]:
    """Lines that say where generation stops, and notes, after its prompts were held against what a stage learns.

    Where benchmarks are asked, theirs is the chat template, whatever prompt the stage has.

    Args:
        cfg: the configuration.
        model: the stage's.
        collate: of the stage; others than of prompts are passed over.
        source: its samples; rows that cannot be used are left to the loader of the windows.
        order: the samples of its first steps are looked at.

    Raises:
        UserError: the chat template cannot be used, generation would be asked what is not learnt, or would not stop.
    """
    if not isinstance(model, VLM) or not isinstance(collate, Collator):
        return []
    asks = bool(cfg.data.get("benchmarks"))
    readers = [collate]
    if asks and collate.encoder.prompt == "plain":
        readers.append(build_collator(cfg, model, "chat"))
    lines = [f"generation stops at {model.lm.stops_line()}"] if asks else []
    left = PROVED
    for index in order.window(0):
        try:
            lines += [f"note: {note}" for reader in readers for note in check_prompt(reader, source[index])]
        except DataError:
            continue
        left -= 1
        if not left:
            break
    return list(dict.fromkeys(lines))


def differing_share(tokens: Tensor) -> float:
    """Share of the visual tokens' variance that differs between images, in 0..1.

    Tokens (I, M, D) vary from place to place and from image to image; the mean over places and widths of the variance
    over images, divided by that of the variance over images and places. 0: every image gives the same tokens.
    """
    tokens = tokens.float()
    between = tokens.var(0, correction=0).mean()
    total = tokens.flatten(0, 1).var(0, correction=0).mean()
    return float(between / total) if float(total) > 0 else 0.0


class TokenVariance(L.Callback):
    """Reports before a stage's first step how much its visual tokens differ between images.

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
        """Report, on rank 0, unless the stage is resumed or the features come from a cache."""
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
        """The first usable rows, one by one; others are written down by the loader of the windows."""
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

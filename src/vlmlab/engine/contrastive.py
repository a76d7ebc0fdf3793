"""``ContrastiveModule``: images and captions meet in one space (``DualEncoder``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from omegaconf import DictConfig
from torch import nn

from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch
from vlmlab.engine.stage import StageModule


class ContrastiveModule(StageModule):
    """Image-caption pairs; one micro-batch per step and rank, since every sample is compared with all others."""

    prompt = "plain"

    @staticmethod
    def build(cfg: DictConfig) -> nn.Module:
        """A ``DualEncoder``: a vision tower and a text tower."""
        from vlmlab.model.build import build_dual_encoder

        return build_dual_encoder(cfg)

    @staticmethod
    def collator(cfg: DictConfig, model: nn.Module, prompt: str) -> Callable[[list[Sample]], Batch]:
        """Samples to a micro-batch with one image a row: pairs are never packed."""
        from vlmlab.model.build import build_collator

        return replace(build_collator(cfg, model, prompt), pack_length=None)  # type: ignore[arg-type]

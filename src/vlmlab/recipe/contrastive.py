"""``ContrastiveModule``: images and captions meet in one space (``DualEncoder``)."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn

from vlmlab.recipe.base import StageModule


class ContrastiveModule(StageModule):
    """Image-caption pairs; one micro-batch per step and rank, since every sample is compared with all others."""

    prompt = "plain"

    @staticmethod
    def build(cfg: DictConfig) -> nn.Module:
        """A ``DualEncoder``: a vision tower and a text tower."""
        from vlmlab.model import build_dual_encoder

        return build_dual_encoder(cfg)

"""Captions of which a known share belongs to another picture, as texts beside images of the web often do."""

from __future__ import annotations

from typing import Unpack

from vlmlab.contracts.values import Count, Seed, Share
from vlmlab.data.world.base import STRIDE, Drawn, Unrendered, check_share
from vlmlab.data.world.scene import Split
from vlmlab.data.world.sources import Style, WorldCaptions
from vlmlab.data.world.words import Domain


class NoisyCaptions(WorldCaptions):
    """``WorldCaptions`` of which a share has the caption of another scene.

    Args:
        style, split, size, seed, domain, grid, objects: as for ``WorldCaptions``.
        noise: share of samples with another scene's caption, in 0..1.

    Raises:
        UserError: as for ``WorldCaptions``, or a share outside 0..1.
    """

    def __init__(
        self,
        style: Style,
        split: Split,
        size: Count,
        seed: Seed = 0,
        domain: Domain = "base",
        noise: Share = 0.4,
        **scale: Unpack[Drawn],
    ) -> None:
        super().__init__(style, split, size, seed, domain, **scale)
        check_share("noise", noise)
        self.noise = noise

    def matched(self, index: int) -> bool:
        """Whether a sample's caption is its own picture's: what a filter has to find out, and no training is told."""
        return not self._stream(index, "noise").chance(self.noise)

    def _unrendered(self, index: int) -> Unrendered:
        sample = super()._unrendered(index)
        if self.matched(index):
            return sample
        other = super()._unrendered(self.size + STRIDE * (index + 1))  # beyond those that are anyone's own
        return Unrendered(sample.id, sample.scenes, other.turns)

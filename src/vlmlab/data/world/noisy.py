"""Texts of which a known share belongs to another picture, as texts beside images of the web often do."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from vlmlab.contracts.values import Count, Share
from vlmlab.data.world.base import STRIDE, ScaledSceneKeys, Unrendered, check_share
from vlmlab.data.world.scene import Split
from vlmlab.data.world.sources import InstructKeys, Style, WorldCaptions, WorldInstruct


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
        noise: Share = 0.4,
        **scenes: Unpack[ScaledSceneKeys],
    ) -> None:
        super().__init__(style, split, size, **scenes)
        check_share("noise", noise)
        self.noise = noise

    def matched(self, index: int) -> bool:
        """Whether a sample's caption is its own picture's: what a filter has to find out, and no training is told."""
        return not self._stream(index, "noise").chance(self.noise)

    def _unrendered(self, index: int) -> Unrendered:
        sample = super()._unrendered(index)
        if self.matched(index):
            return sample
        return replace(sample, turns=super()._unrendered(_elsewhere(index, self.size)).turns)


class NoisyInstruct(WorldInstruct):
    """``WorldInstruct`` of which a share of conversations is about another scene.

    Args:
        split, size, seed, domain, caption_fraction, kinds, grid, objects: as for ``WorldInstruct``.
        noise: share of samples with another scene's turns, in 0..1.

    Raises:
        UserError: as for ``WorldInstruct``, or a share outside 0..1.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        noise: Share = 0.4,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        check_share("noise", noise)
        self.noise = noise

    def matched(self, index: int) -> bool:
        """Whether a sample's turns are about its own picture."""
        return not self._stream(index, "noise").chance(self.noise)

    def _unrendered(self, index: int) -> Unrendered:
        sample = super()._unrendered(index)
        if self.matched(index):
            return sample
        return replace(sample, turns=super()._unrendered(_elsewhere(index, self.size)).turns)


def _elsewhere(index: int, size: int) -> int:
    """A scene's number beyond those that are any sample's own."""
    return size + STRIDE * (index + 1)

"""Texts of which a known share belongs to another picture, as texts beside images of the web often do."""

from __future__ import annotations

from collections.abc import Callable
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
        """Whether a sample's turns are about its own picture: what a filter has to find out, and no training reads."""
        return not self._stream(index, "noise").chance(self.noise)

    def _unrendered(self, index: int) -> Unrendered:
        return _mismatched(super()._unrendered, index, self.size, self.matched(index))


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
        """Whether a sample's turns are about its own picture: what a filter has to find out, and no training reads."""
        return not self._stream(index, "noise").chance(self.noise)

    def _unrendered(self, index: int) -> Unrendered:
        return _mismatched(super()._unrendered, index, self.size, self.matched(index))


def _mismatched(unrendered: Callable[[int], Unrendered], index: int, size: int, matched: bool) -> Unrendered:
    """A sample, with the turns of a scene beyond those that are any sample's own unless it is matched."""
    sample = unrendered(index)
    return sample if matched else replace(sample, turns=unrendered(size + STRIDE * (index + 1)).turns)

"""The two baselines that are beside every score: wrong images (a fixed derangement) and no image at all."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, SampleSource


class Limited:
    """The first `limit` samples of a source.

    Args:
        source: the data set.
        limit: how many; None for all.
    """

    def __init__(self, source: SampleSource, limit: int | None = None) -> None:
        self.source = source
        self.limit = limit

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source[index]


class Shuffled:
    """Every sample with the images of another one: a fixed derangement of the images, the same in every run.

    Args:
        source: the data set; samples that share an image get the same wrong one. Where the first samples of a data set
            all show the same image, the wrong one comes from the rows after them.
        seed: of the derangement.

    Raises:
        DataError: the data set shows fewer than two different images.
    """

    def __init__(self, source: SampleSource, seed: int = 0) -> None:
        self.source = source
        self.whole = source.source if isinstance(source, Limited) else source
        self.seed = seed

    @cached_property
    def _partners(self) -> dict[tuple[str, ...], int]:
        """The images of a sample -> index in the whole data set of the sample whose images it is shown."""
        first: dict[tuple[str, ...], int] = {}
        for index in range(len(self.whole)):
            if index >= len(self.source) and len({name for group in first for name in group[:1]}) > 1:
                break
            sample = self.whole[index]
            if sample.images:
                first.setdefault(image_names(sample), index)
        groups = sorted(first)
        order = [groups[i] for i in np.random.default_rng(self.seed).permutation(len(groups))]
        if len({name for group in groups for name in group[:1]}) < 2:
            raise DataError("The shuffled baseline needs at least two different images; evaluate on more samples.")
        return {own: first[self._other(order, place)] for place, own in enumerate(order)}

    @staticmethod
    def _other(order: list[tuple[str, ...]], place: int) -> tuple[str, ...]:
        """The next group in the circle that shares no image with this one, or else simply the next."""
        for step in range(1, len(order)):
            other = order[(place + step) % len(order)]
            if not set(other) & set(order[place]):
                return other
        return order[(place + 1) % len(order)]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        if not sample.images:
            return sample
        wrong = self.whole[self._partners[image_names(sample)]]
        names = image_names(wrong)
        count = len(sample.images)
        return replace(
            sample,
            images=tuple(wrong.images[k % len(names)] for k in range(count)),
            image_ids=tuple(names[k % len(names)] for k in range(count)),
        )


class NoImage:
    """Every sample without its images: only the words are left.

    Args:
        source: the data set.
    """

    def __init__(self, source: SampleSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        turns = tuple(replace(turn, prompt=turn.prompt.replace(IMAGE_TAG, "").strip()) for turn in sample.turns)
        return replace(sample, images=(), image_ids=(), turns=turns)


def image_names(sample: Sample) -> tuple[str, ...]:
    """One stable name per image of a sample."""
    return sample.image_ids or tuple(f"{sample.id}#{k}" for k in range(len(sample.images)))

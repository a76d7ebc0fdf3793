"""Which masks let questions share what comes before them: found on small trees, the same as on a random LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.tiny import choices
from torch import Tensor

from vlmlab.contracts.tensors import Images, Layout, Role
from vlmlab.mask.base import ground, not_later, pair, same_era
from vlmlab.mask.memory.base import begun, of_sample
from vlmlab.mask.trees import equal_in_trees, images_equal_in_trees

UNEQUAL = {"prefix_lm", "visual_rows_open"}
"""What comes before the question sees some of it."""


def built(path: Path) -> Any:
    return instantiate(OmegaConf.load(path))


@pytest.mark.parametrize("path", choices("mask"), ids=lambda p: p.stem)
def test_which_masks_are_equal(path: Path) -> None:
    assert equal_in_trees(built(path)) == (path.stem not in UNEQUAL)


@pytest.mark.parametrize("path", choices("memory_mask"), ids=lambda p: p.stem)
def test_every_memory_mask_is_equal(path: Path) -> None:
    assert images_equal_in_trees(built(path))


def test_it_works_where_another_device_is_the_default() -> None:
    with torch.device("meta"):
        assert equal_in_trees(built(next(path for path in choices("mask") if path.stem == "bidir")))
        assert images_equal_in_trees(built(choices("memory_mask")[0]))


class PrefixOfWords:
    """The words before an answer see each other; the images see nothing of them."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_open, k_open = pair((layout.role != Role.ANSWER) & ~layout.visual, q)
        rule = not_later(layout, q) & ~pair(layout.visual, q)[0] | (q_open & k_open & same_era(layout, q))
        return ground(rule, layout, q)


class WithinSamples:
    """Branches see each other."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        q_segment, k_segment = pair(layout.segment, q)
        return not_later(layout, q) & (q_segment == k_segment)


class NearByIndex:
    """A window over the places of the row."""

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        keys = torch.arange(layout.kind.shape[1])
        return ground(not_later(layout, q) & (q[:, None] - keys < 6), layout, q)


@pytest.mark.parametrize("mask", [PrefixOfWords(), WithinSamples(), NearByIndex()])
def test_foreign_masks_that_are_not(mask: Any) -> None:
    assert not equal_in_trees(mask)


class ImagesNearby:
    """Images of the last few places."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        near = q[None, :, None] - images.place < 8
        return of_sample(layout, images, q) & begun(layout, images, q) & near


def test_a_foreign_memory_mask_that_is_not() -> None:
    assert not images_equal_in_trees(ImagesNearby())

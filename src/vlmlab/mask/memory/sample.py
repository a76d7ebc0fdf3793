"""``sample``: a position sees the images of its whole packed sample, as far as the leak rule allows.

Images before it always; a later one only where no answer token is between, so that an answer never sees an image of
a later turn, whose question may tell what was answered.
"""

from __future__ import annotations

from torch import Tensor

from vlmlab.contracts.tensors import Images, Layout
from vlmlab.mask.memory.base import begun, not_of_later_turn, of_sample


class ImagesOfSample:
    """sees(i, k) = place(k) <= i, or no answer token is between i and k; in the same packed sample."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        """(B, Q, I) for the query positions ``q (Q,)``."""
        near = begun(layout, images, q) | not_of_later_turn(layout, images, q)
        return of_sample(layout, images, q) & near

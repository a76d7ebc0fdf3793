"""``before``: a position sees every image of its sample that is before it, or to which it belongs."""

from __future__ import annotations

from torch import Tensor

from vlmlab.contracts.tensors import Images, Layout
from vlmlab.mask.memory.base import begun, of_sample


class ImagesBefore:
    """sees(i, k) = place(k) <= i, in the same packed sample."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        """(B, Q, I) for the query positions ``q (Q,)``."""
        return of_sample(layout, images, q) & begun(layout, images, q)

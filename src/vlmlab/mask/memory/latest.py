"""``latest``: a position sees only the image before it that is nearest (Flamingo, arXiv 2204.14198, section 2.4).

Of images without text between them only the last is seen, as Flamingo's code has it (`text_time == media_time`: every
image begins a time of its own). Tiles of one picture, and frames of one video, are one image in this sense.
"""

from __future__ import annotations

from torch import Tensor

from vlmlab.contracts.tensors import Images, Layout
from vlmlab.mask.memory.base import begun, of_sample


class LatestImage:
    """sees(i, k) = place(k) <= i and no image of the sample after k has begun by i."""

    def __call__(self, layout: Layout, images: Images, q: Tensor) -> Tensor:
        """(B, Q, I) for the query positions ``q (Q,)``."""
        sees = of_sample(layout, images, q) & begun(layout, images, q)
        if not len(images):
            return sees
        order = ((images.tile == 0) & (images.frame == 0)).long().cumsum(0)  # (I,) the table is in reading order
        last = order.where(sees, -1).amax(2, keepdim=True)  # (B, Q, 1)
        return sees & (order == last)

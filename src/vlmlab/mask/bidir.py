"""``bidir``: no causal mask between the visual tokens of one image; text stays causal.

The best reading of "the attention mask should not be applied to visual inputs" (arXiv 2503.19508, abstract);
Gemma-3 does the same within each image.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later, pair, same_era


class Bidirectional:
    """allowed(i, j) = j <= i, or both visual and of the same image (with no answer token between them)."""

    rule: ClassVar[str] = "earlier | (q_visual & k_visual & (q_image == k_image))"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        q_visual, k_visual = pair(layout.visual, q)
        q_image, k_image = pair(layout.image, q)
        one_image = q_visual & k_visual & (q_image == k_image)
        return ground(not_later(layout, q) | (one_image & same_era(layout, q)), layout, q)

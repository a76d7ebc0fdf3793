"""``bidir_all_images``: no causal mask between any two visual tokens, also of different images; text stays causal.

The widest reading of "the attention mask should not be applied to visual inputs" (arXiv 2503.19508, abstract) that
opens nothing to text. With one image it equals ``bidir``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later, pair, same_era


class BidirectionalAllImages:
    """allowed(i, j) = j <= i, or both visual (with no answer token between them).

    Attributes:
        shows_prompt: a word of the prompt depends on later ones, through an image after them.
    """

    shows_prompt: ClassVar[bool] = True
    rule: ClassVar[str] = "earlier | (q_visual & k_visual & (q_era == k_era))"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        q_visual, k_visual = pair(layout.visual, q)
        return ground(not_later(layout, q) | (q_visual & k_visual & same_era(layout, q)), layout, q)

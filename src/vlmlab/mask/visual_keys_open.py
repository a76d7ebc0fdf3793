"""``visual_keys_open``: every token sees every visual token, also one that comes later.

The key-side reading of "the attention mask should not be applied to visual inputs" (arXiv 2503.19508, abstract): it
differs from ``bidir`` where text is before an image, which a chat template's header always does.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later, pair, same_era


class VisualKeysOpen:
    """allowed(i, j) = j <= i, or j visual (with no answer token between them).

    Attributes:
        shows_prompt: a word of the prompt depends on later ones, through an image.
    """

    shows_prompt: ClassVar[bool] = True
    rule: ClassVar[str] = "earlier | (k_visual & (q_era == k_era))"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        _, k_visual = pair(layout.visual, q)
        return ground(not_later(layout, q) | (k_visual & same_era(layout, q)), layout, q)

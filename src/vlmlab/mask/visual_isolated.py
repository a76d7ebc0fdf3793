"""``visual_isolated``: visual tokens never see text; otherwise causal.

What an image becomes then depends on images only, as if it had been read before the words around it. Ours, an ablation
of arXiv 2503.19508's masks: does it matter that an image sees the text before it?
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later, pair


class VisualIsolated:
    """allowed(i, j) = j <= i, and a visual query sees visual keys only."""

    rule: ClassVar[str] = "earlier & (~q_visual | k_visual)"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        q_visual, k_visual = pair(layout.visual, q)
        return ground(not_later(layout, q) & (~q_visual | k_visual), layout, q)

"""``visual_self_only``: a visual token sees itself alone; text stays causal (EE-MLLM, arXiv 2408.11795).

EE-MLLM removes self-attention among visual tokens: each layer then updates them by its own value and output projections
and its feed-forward part, which is dense attention with a diagonal mask on visual rows.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later, pair, same_place


class VisualSelfOnly:
    """allowed(i, j) = j <= i, and a visual query sees only itself."""

    visual_alone = True
    rule: ClassVar[str] = "earlier & (~q_visual | same)"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        q_visual, _ = pair(layout.visual, q)
        return ground(not_later(layout, q) & (~q_visual | same_place(layout, q)), layout, q)

"""``causal``: every token sees itself and what came before, images included. The baseline of arXiv 2503.19508."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later


class Causal:
    """allowed(i, j) = j <= i."""

    rule: ClassVar[str] = "earlier"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        return ground(not_later(layout, q), layout, q)

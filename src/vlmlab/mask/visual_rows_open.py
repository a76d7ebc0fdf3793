"""``visual_rows_open``: visual tokens see everything, the answer included. A negative control, refused for training.

The query-side reading of "the attention mask should not be applied to visual inputs" (arXiv 2503.19508, abstract). Even
under the leak rule it shows the first token of the next answer to the images, and through them to the words that must
predict it: the leak test has to find that.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout
from vlmlab.mask.base import ground, not_later, pair, same_era


class VisualRowsOpen:
    """allowed(i, j) = j <= i, or i visual (with no answer token between them).

    Attributes:
        leaks: an answer's logits depend on that answer.
        shows_prompt: a word of the prompt depends on later ones.
    """

    leaks: ClassVar[bool] = True
    shows_prompt: ClassVar[bool] = True

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        q_visual, _ = pair(layout.visual, q)
        return ground(not_later(layout, q) | (q_visual & same_era(layout, q)), layout, q)

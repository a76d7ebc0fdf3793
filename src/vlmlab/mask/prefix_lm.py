"""``prefix_lm``: images and prompt see each other both ways, answers stay causal (PaliGemma, arXiv 2407.07726).

"Prefix" is whatever is not an answer: the system line, the user's words, the images and the template's own tokens. With
several turns every stretch between two answers is a prefix of its own, since the leak rule closes it at each answer.
Where a prompt is learnt too (``prompt: text``) this mask would show it: the rules of the command refuse that.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vlmlab.contracts.tensors import Layout, Role
from vlmlab.mask.base import ground, not_later, pair, same_era


class PrefixLM:
    """allowed(i, j) = j <= i, or neither has role answer (with no answer token between them).

    Attributes:
        shows_prompt: a word of the prompt depends on later ones, directly.
    """

    shows_prompt: ClassVar[bool] = True
    rule: ClassVar[str] = "earlier | (~q_answer & ~k_answer & (q_era == k_era))"

    def __call__(self, layout: Layout, q: Tensor) -> Tensor:
        """(B, Q, S) for the query positions ``q (Q,)``."""
        q_prefix, k_prefix = pair(layout.role != Role.ANSWER, q)
        return ground(not_later(layout, q) | (q_prefix & k_prefix & same_era(layout, q)), layout, q)

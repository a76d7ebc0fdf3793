"""``concat``: visual tokens are in the LM's sequence where the image placeholders are (LLaVA; arXiv 2503.19508)."""

from __future__ import annotations

from vlmlab.fusion.base import InSequence


class ConcatFusion(InSequence):
    """Scatters the visual tokens to the positions that the collator has set aside for them."""

    starts_as = "concat"
    has_weights = False

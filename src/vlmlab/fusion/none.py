"""``none``: no vision at all; the LM equals transformers' bit for bit."""

from __future__ import annotations

from vlmlab.contracts.parts import Fusion


class NoFusion(Fusion):
    """Images are read from the data and left out of the sequence; no encoder and no connector is built."""

    reads = "nothing"
    in_sequence = False
    starts_as = "text_only"
    has_weights = False

"""``none``: no vision at all; the LM equals transformers' bit for bit."""

from __future__ import annotations

from torch import Tensor, nn

from vlmlab.contracts.parts import Fusion
from vlmlab.contracts.tensors import Batch


class NoFusion(Fusion):
    """Images are read from the data and left out of the sequence; no encoder and no connector is built."""

    reads = "nothing"
    in_sequence = False
    starts_as = "text_only"

    def tokens_per_image(self, tokens: int) -> int:
        """No token enters the sequence."""
        return 0

    def attach(self, lm: nn.Module) -> None:
        """Nothing is added to the LM."""

    def forward(self, tokens: Tensor, embeds: Tensor, batch: Batch) -> Tensor:
        """The embeddings as they are."""
        return embeds

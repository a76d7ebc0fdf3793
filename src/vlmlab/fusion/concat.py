"""``concat``: visual tokens stand in the LM's sequence where the image placeholders are (LLaVA; arXiv 2503.19508)."""

from __future__ import annotations

from torch import Tensor, nn

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.parts import Fusion
from vlmlab.contracts.tensors import Batch


class ConcatFusion(Fusion):
    """Scatters the visual tokens to the positions that the collator has set aside for them."""

    reads = "tokens"
    in_sequence = True
    starts_as = "concat"

    def tokens_per_image(self, tokens: int) -> int:
        """All of the connector's tokens enter the sequence."""
        return tokens

    def attach(self, lm: nn.Module) -> None:
        """Nothing is added to the LM."""

    def forward(self, tokens: Tensor, embeds: Tensor, batch: Batch) -> Tensor:
        """(I, M, D) visual tokens into (B, S, D) embeddings -> (B, S, D).

        Raises:
            DataError: the batch has more or fewer visual positions than visual tokens.
        """
        visual = batch.layout.visual
        if int(visual.sum()) != tokens.shape[0] * tokens.shape[1]:
            raise DataError(
                f"Samples {batch.sample_ids} have {int(visual.sum())} image positions for "
                f"{tokens.shape[0]} x {tokens.shape[1]} visual tokens; check their image tags."
            )
        return embeds.masked_scatter(visual[..., None], tokens.to(embeds.dtype))  # row-major, as images are listed

"""``concat``: visual tokens stand in the LM's sequence where the image placeholders are (LLaVA; arXiv 2503.19508)."""

from __future__ import annotations

from torch import Tensor

from vlmlab.contracts.errors import DataError, UserError
from vlmlab.contracts.parts import Fusion, VisionLanguageModel
from vlmlab.contracts.tensors import Batch, Seen


class ConcatFusion(Fusion):
    """Scatters the visual tokens to the positions that the collator has set aside for them."""

    reads = "tokens"
    in_sequence = True
    starts_as = "concat"
    has_weights = False

    def tokens_per_image(self, tokens: int) -> int:
        """All of the connector's tokens enter the sequence."""
        return tokens

    def attach(self, model: VisionLanguageModel) -> None:
        """Nothing is added.

        Raises:
            UserError: the connector's tokens are not as wide as the LM.
        """
        if model.token_width != model.lm.width:
            raise UserError(
                f"connector: its tokens are {model.token_width} wide and the LM is {model.lm.width} wide, so that they "
                "cannot stand in its sequence; use connector=linear or mlp, or a fusion that reads them elsewhere."
            )

    def embed(self, seen: Seen, embeds: Tensor, batch: Batch) -> Tensor:
        """(I, M, D) visual tokens into (B, S, D) embeddings -> (B, S, D).

        Raises:
            DataError: the batch has more or fewer visual positions than visual tokens.
        """
        tokens, visual = seen.tokens, batch.layout.visual
        count = 0 if tokens is None else int((batch.images.row >= 0).sum()) * tokens.shape[1]
        if int(visual.sum()) != count:
            raise DataError(
                f"Samples {batch.sample_ids} have {int(visual.sum())} image positions for "
                f"{count} visual tokens; check their image tags."
            )
        if tokens is None or not count:
            return embeds
        return embeds.masked_scatter(visual[..., None], tokens.to(embeds.dtype))  # row-major, as images are listed

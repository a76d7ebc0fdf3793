"""``hf`` of ``text_tower``: the text half of any CLIP or SigLIP checkpoint, by local folder or hub id."""

from __future__ import annotations

from vlmlab.contracts.values import Architecture, Dtype, Text
from vlmlab.encoder.text import TransformersPairText, open_pair_text


class HfPairText(TransformersPairText):
    """A transformers text tower as one of a pair.

    Args:
        path: local folder or hub id of a two-tower checkpoint, or of a text tower alone.
        head: take the checkpoint's own projections, temperature and bias too, so that with the same checkpoint's
            encoder the pair is the whole CLIP or SigLIP; false, or a text tower alone: ``dual_encoder`` makes new ones.
        dtype: dtype of the weights; trainable weights stay float32.
        architecture: what the config.json of a hub id says; read only on the meta device (``vlmlab.towers.blueprint``).

    Raises:
        UserError: the path is neither a folder nor reachable, or holds no text tower of a known family.
    """

    def __init__(
        self, path: Text, head: bool = True, dtype: Dtype = "float32", architecture: Architecture | None = None
    ) -> None:
        found = open_pair_text(path, dtype, head, architecture)
        super().__init__(found.model, found.tokenizer, found.source, found.head)  # type: ignore[arg-type]

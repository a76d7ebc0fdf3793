"""``embedded``, ``embedded_siglip`` of ``text_tower``: the shipped text towers, each beside the encoder of its name."""

from __future__ import annotations

from vlmlab.contracts.values import Text
from vlmlab.encoder.text import TransformersPairText, open_pair_text
from vlmlab.towers.source import embedded


class EmbeddedPairText(TransformersPairText):
    """A shipped text tower; its pooled output is compared with that of the shipped vision tower itself.

    Args:
        pair: as of ``encoder``: "demo", or "testbed".
    """

    def __init__(self, pair: Text = "demo") -> None:
        found = open_pair_text(str(embedded("text", pair)), "float32")
        super().__init__(found.model, found.tokenizer, found.source, found.head)  # type: ignore[arg-type]

"""``embedded`` and ``embedded_text``: the tiny Qwen2s that ship with the package, trained on text about its world."""

from __future__ import annotations

from vlmlab.contracts.values import Text
from vlmlab.lm.causal import CausalLanguageModel, open_lm
from vlmlab.towers.source import embedded


class EmbeddedLanguageModel(CausalLanguageModel):
    """A shipped LM, loaded through the same code as any real one.

    Args:
        gradient_checkpointing: see ``CausalLanguageModel``.
        pair: "demo" has also read scenes as a picture's tokens give them, a cell a position; "testbed" only sentences.
    """

    def __init__(self, gradient_checkpointing: bool = False, pair: Text = "demo") -> None:
        model, tokenizer, source, own = open_lm(str(embedded("lm", pair)), "float32")
        super().__init__(
            model, tokenizer, source=source, own_tokenizer=own, gradient_checkpointing=gradient_checkpointing
        )

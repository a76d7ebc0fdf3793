"""``embedded``: the tiny Qwen2 that ships with the package, trained on text about the embedded world."""

from __future__ import annotations

from vlmlab.lm.causal import CausalLanguageModel, open_lm
from vlmlab.towers.source import embedded


class EmbeddedLanguageModel(CausalLanguageModel):
    """The shipped LM, loaded through the same code as any real one.

    Args:
        gradient_checkpointing: see ``CausalLanguageModel``.
    """

    def __init__(self, gradient_checkpointing: bool = False) -> None:
        model, tokenizer, source, own = open_lm(str(embedded("lm")), "float32")
        super().__init__(
            model, tokenizer, source=source, own_tokenizer=own, gradient_checkpointing=gradient_checkpointing
        )

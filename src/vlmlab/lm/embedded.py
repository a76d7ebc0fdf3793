"""``embedded``: the tiny Qwen2 that ships with the package, trained on text about the embedded world."""

from __future__ import annotations

from vlmlab.lm.hf import HfLanguageModel
from vlmlab.towers import embedded


class EmbeddedLanguageModel(HfLanguageModel):
    """The shipped LM, loaded through the same code as any real one.

    Args:
        gradient_checkpointing: see ``HfLanguageModel``.
    """

    def __init__(self, gradient_checkpointing: bool = False) -> None:
        super().__init__(path=str(embedded("lm")), gradient_checkpointing=gradient_checkpointing)

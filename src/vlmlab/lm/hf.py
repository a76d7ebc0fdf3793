"""``hf``: any transformers causal LM, by local folder or hub id."""

from __future__ import annotations

from vlmlab.contracts.values import Architecture, Dtype, Text
from vlmlab.lm.causal import CausalLanguageModel, open_lm


class HfLanguageModel(CausalLanguageModel):
    """A causal LM and its tokenizer, with an image placeholder token and masks of ours.

    Args:
        path: local folder or hub id.
        dtype: dtype of the frozen weights.
        image_token: the placeholder; added after the vocabulary where the tokenizer lacks it.
        gradient_checkpointing: recompute activations in the backward pass.
        chat_template: Jinja text for a tokenizer without one, as base models have them; null: the tokenizer's own.
        architecture: what the config.json of a hub id says; read only on the meta device (``vlmlab.towers.blueprint``).

    Raises:
        UserError: the path is neither a folder nor reachable, the tokenizer has no chat template or end token,
            or the family changes its logits in a way this class does not reproduce.
    """

    def __init__(
        self,
        path: Text,
        dtype: Dtype = "float32",
        image_token: Text = "<|image|>",
        gradient_checkpointing: bool = False,
        chat_template: Text | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        model, tokenizer, source, own = open_lm(path, dtype, architecture)
        if chat_template is not None and own:
            tokenizer.chat_template = chat_template
        super().__init__(model, tokenizer, image_token, source, own, gradient_checkpointing)

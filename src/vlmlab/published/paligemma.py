"""PaliGemma (arXiv 2407.07726): SigLIP, one linear layer, Gemma; images and prompt see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration, PreTrainedModel

from vlmlab.contracts.errors import UserError
from vlmlab.published.base import Keys, Published, causal_lm


class PaliGemma(Published):
    """``PaliGemmaForConditionalGeneration`` with Gemma."""

    model = PaliGemmaForConditionalGeneration

    def keys(self, config: Any) -> Keys:
        """The tower's final output, ``linear``, and ``prefix_lm``."""
        if getattr(config.text_config, "sliding_window", None) is not None:
            raise UserError(
                "its language model (Gemma 2) sees a window, which PaliGemma lifts for the prompt and mask=prefix_lm "
                "does not"
            )
        return {"encoder.layers": None, "connector": "linear", "mask": "prefix_lm"}

    def tower(self, model: Any) -> PreTrainedModel:
        """As it is."""
        return model.model.vision_tower

    def lm(self, model: Any) -> PreTrainedModel:
        """Layers and head; attention is decided by the mask, and no longer by the config."""
        model.model.language_model.config.use_bidirectional_attention = None
        return causal_lm(model.model.language_model, model.lm_head)

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """One linear layer."""
        linear = model.model.multi_modal_projector.linear
        return {f"layer.{name}": weight for name, weight in linear.state_dict().items()}

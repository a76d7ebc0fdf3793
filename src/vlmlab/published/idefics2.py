"""Idefics2 (arXiv 2405.02246) at one image size: SigLIP, gated MLP, perceiver, Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Idefics2ForConditionalGeneration, PreTrainedModel

from vlmlab.published.base import Keys, Published, causal_lm, only


class Idefics2(Published):
    """``Idefics2ForConditionalGeneration``; images of their own size and their crops are not reproduced."""

    model = Idefics2ForConditionalGeneration
    tiled = True

    def keys(self, config: Any) -> Keys:
        """The tower's final output and ``idefics2``."""
        perceiver, text = config.perceiver_config, config.text_config
        only(perceiver, "its perceiver", hidden_act="silu", rms_norm_eps=1e-6, hidden_size=text.hidden_size)
        only(text, "its projection", hidden_act="silu")
        return {
            "encoder.layers": None,
            "connector": "idefics2",
            "connector.latents": perceiver.resampler_n_latents,
            "connector.depth": perceiver.resampler_depth,
            "connector.heads": perceiver.resampler_n_heads,
            "connector.head_dim": perceiver.resampler_head_dim,
            "connector.kv_heads": perceiver.num_key_value_heads,
            "connector.hidden": text.intermediate_size,
            "mask": "causal",
        }

    def tower(self, model: Any) -> PreTrainedModel:
        """As it is."""
        return model.model.vision_model

    def lm(self, model: Any) -> PreTrainedModel:
        """Layers and head."""
        return causal_lm(model.model.text_model, model.lm_head)

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """Projection and perceiver."""
        theirs = model.model.connector
        parts = {"mlp": theirs.modality_projection, "resampler": theirs.perceiver_resampler}
        return {f"{part}.{name}": w for part, module in parts.items() for name, w in module.state_dict().items()}

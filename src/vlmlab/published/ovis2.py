"""Ovis2 (arXiv 2405.20797) with one tile an image: AIMv2, visual words, Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel, Ovis2ForConditionalGeneration, PreTrainedModel

from vlmlab.contracts.errors import UserError
from vlmlab.published.base import Keys, Published, causal_lm, only

SHARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *("patch_size", "hidden_act", "attention_dropout", "rms_norm_eps", "qkv_bias", "mlp_bias"),
)
"""Keys of the tower's config that are AIMv2's."""

AROUND = (0, 1, 4)
"""Which of the five indicators are around one tile: begin, grid (where further tiles would follow), end."""


class Ovis2(Published):
    """``Ovis2ForConditionalGeneration``; images cut into several tiles are not reproduced."""

    model = Ovis2ForConditionalGeneration
    tiled = True

    def keys(self, config: Any) -> Keys:
        """The tower's final output and ``ovis`` with one token before an image's tokens and two after them."""
        vision = config.vision_config
        only(vision, "its tower", num_visual_indicator_tokens=5)
        if vision.tokenize_function == "gumbel_argmax":
            raise UserError("tokenize_function=gumbel_argmax draws words at random also where nothing is trained")
        return {
            "encoder.layers": None,
            "connector": "ovis",
            "connector.words": vision.vocab_size - vision.num_visual_indicator_tokens,
            "connector.stride": vision.hidden_stride,
            "connector.tokenize": vision.tokenize_function,
            "connector.indicators": True,
            "connector.ends": len(AROUND) - 1,
            "mask": "causal",
        }

    def tower(self, model: Any) -> PreTrainedModel:
        """The transformer below the words' head, which is AIMv2's by other names."""
        theirs = model.model.vision_tower
        config = Aimv2VisionConfig(use_head=False, **{key: getattr(theirs.config, key) for key in SHARED})
        with torch.device("meta"):
            tower = Aimv2VisionModel._from_config(config, dtype=theirs.dtype)
        weights = theirs.transformer.state_dict()
        named = {name.replace("embeddings.patch_embedding", "embeddings.patch_embed"): w for name, w in weights.items()}
        tower.load_state_dict(named, assign=True)
        return tower

    def lm(self, model: Any) -> PreTrainedModel:
        """Layers and head."""
        return causal_lm(model.model.language_model, model.lm_head)

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """Head, norm, and the table without the indicators of further tiles."""
        tower, table = model.model.vision_tower, model.model.visual_embeddings_table.weight
        words = tower.head_linear.out_features
        return {
            "head.weight": tower.head_linear.weight,
            "norm.weight": tower.head_norm.weight,
            "norm.bias": tower.head_norm.bias,
            "table.weight": torch.cat([table[:words], table[[words + k for k in AROUND]]]),
        }

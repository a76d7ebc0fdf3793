"""LLaVA (arXiv 2304.08485, 2310.03744) and what shares its class: tower, two linear layers, language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, zeros_like
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from vlmlab.contracts.errors import UserError
from vlmlab.published.base import Keys, Published, before_patches, causal_lm, only


class Llava(Published):
    """``LlavaForConditionalGeneration``."""

    model: type[PreTrainedModel] = LlavaForConditionalGeneration

    def keys(self, config: Any) -> Keys:
        """Tapped layers, with or without the class token, and ``mlp``."""
        only(config, "its projector", projector_hidden_act="gelu")
        layers = config.vision_feature_layer
        return {
            "encoder.layers": [layers] if isinstance(layers, int) else list(layers),
            "encoder.class_token": keeps_class_token(config),
            "connector": "mlp",
            "connector.depth": 2,
            "mask": "causal",
        }

    def tower(self, model: Any) -> PreTrainedModel:
        """As it is."""
        return model.model.vision_tower

    def lm(self, model: Any) -> PreTrainedModel:
        """Layers and head."""
        return causal_lm(model.model.language_model, model.lm_head)

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """Two linear layers; biases that are not there are zero."""
        projector = model.model.multi_modal_projector
        weights = {}
        for place, layer in ((0, projector.linear_1), (2, projector.linear_2)):
            weights[f"layers.{place}.weight"] = layer.weight
            weights[f"layers.{place}.bias"] = zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias
        return weights


def keeps_class_token(config: Any) -> bool:
    """Whether the tower's class token is among the visual tokens.

    Raises:
        UserError: the first token is dropped where that is a patch, or one of several.
    """
    special = before_patches(config.vision_config)
    if config.vision_feature_select_strategy == "full":
        return special > 0
    if special != 1:
        raise UserError(
            "vision_feature_select_strategy=default drops the first token and its tower has "
            f"{special or 'none'} before the patches, so that it is not the patches that are left"
        )
    return False

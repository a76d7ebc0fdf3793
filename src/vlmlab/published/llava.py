"""LLaVA (arXiv 2304.08485, 2310.03744) and what shares its class: tower, two linear layers, language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn, no_grad
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from vlmlab.connector.linear import LinearConnector
from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.errors import UserError
from vlmlab.model.vlm import VLM
from vlmlab.published.base import Exportable, Keys, auto_tower, before_patches, causal_lm, plain_lm

NOTHING = "linear"
"""transformers' name for an activation that changes nothing: one linear layer, followed by the identity."""


class Llava(Exportable):
    """``LlavaForConditionalGeneration``."""

    model: type[PreTrainedModel] = LlavaForConditionalGeneration

    def keys(self, config: Any) -> Keys:
        """Tapped layers, with or without the class token, and ``mlp``; ``linear`` where nothing is between layers."""
        activation = config.projector_hidden_act
        if activation not in ACT2FN:
            raise UserError(f"its projector has projector_hidden_act={activation}, which transformers does not have")
        mlp = {"connector": "mlp", "connector.depth": 2, "connector.activation": activation}
        return {
            "encoder.layers": tapped_layers(config),
            "encoder.class_token": keeps_class_token(config),
            **({"connector": "linear"} if activation == NOTHING else mlp),
            "mask": "causal",
        }

    def tower(self, model: Any) -> PreTrainedModel:
        """As it is."""
        return model.model.vision_tower

    def lm(self, model: Any) -> PreTrainedModel:
        """Layers and head."""
        return causal_lm(model.model.language_model, model.lm_head)

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """Two linear layers; biases that are not there are zero. Two with nothing between them are one."""
        projector = model.model.multi_modal_projector
        (first, bias), (second, end) = (_affine(layer) for layer in (projector.linear_1, projector.linear_2))
        if model.config.projector_hidden_act == NOTHING:
            return {"layer.weight": second @ first, "layer.bias": second @ bias + end}
        return {"layers.0.weight": first, "layers.0.bias": bias, "layers.2.weight": second, "layers.2.bias": end}

    def lacks(self, model: VLM) -> str | None:
        """Other connectors than a linear layer, or two as wide as the language model; tokens before the patches."""
        if (why := fits_llava(model)) is not None:
            return why
        connector: Any = model.connector
        if type(connector) is LinearConnector:
            return None
        if type(connector) is not MlpConnector or connector.end is not None or len(connector.layers) != 3:
            return "has a projector of one linear layer or two"
        if connector.layers[0].out_features != model.lm.width:
            return "has a projector as wide as the language model between its layers (connector.hidden=null)"
        return None

    def config_of(self, model: VLM, tower: PreTrainedModel) -> PreTrainedConfig:
        """LLaVA's; one linear layer is followed by the identity."""
        encoder: Any = model.encoder
        vision, text, layers = copy.deepcopy(tower.config), copy.deepcopy(model.lm.model.config), encoder.layers
        if layers is None:
            vision.tie_last_hidden_states = True  # type: ignore[attr-defined]  # the last one is after the norm
        connector: Any = model.connector
        activation = NOTHING if type(connector) is LinearConnector else connector.activation
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=model.lm.image_id,
            image_seq_length=model.tokens_per_image,
            projector_hidden_act=activation,
            vision_feature_select_strategy="full" if encoder.class_token or not encoder.special else "default",
            vision_feature_layer=-1 if layers is None else layers[0] if len(layers) == 1 else list(layers),
            tie_word_embeddings=text.tie_word_embeddings,
        )

    @no_grad()
    def place(self, whole: Any, model: VLM, tower: PreTrainedModel) -> None:
        """Tower, layers, head, and the projector's values."""
        lm: Any = model.lm.model
        whole.model.vision_tower, whole.model.language_model = tower, lm.base_model
        whole.lm_head = lm.get_output_embeddings()
        projector = whole.model.multi_modal_projector.to_empty(device="cpu")
        ours: Any = model.connector
        linears = [ours.layer, None] if type(ours) is LinearConnector else [ours.layers[0], ours.layers[2]]
        for theirs, own in zip((projector.linear_1, projector.linear_2), linears, strict=True):
            eye = torch.eye(len(theirs.weight))
            theirs.weight.copy_(eye if own is None else own.weight)
            theirs.bias.copy_(torch.zeros_like(theirs.bias) if own is None else own.bias)


def fits_llava(model: VLM) -> str | None:
    """What the class lacks of a composition's tower and language model; None: it can hold them."""
    encoder: Any = model.encoder
    if not auto_tower(encoder.tower):
        return "has only vision towers that AutoModel makes"
    if encoder.special > 1 and not encoder.class_token:
        return f"drops one token before the patches, and this tower has {encoder.special}"
    return plain_lm(model)


def tapped_layers(config: Any) -> list[int] | None:
    """Which hidden states are read; None: the final output, where that takes the last one's place."""
    layers = config.vision_feature_layer
    if layers == -1 and getattr(config.vision_config, "tie_last_hidden_states", False):
        return None
    return [layers] if isinstance(layers, int) else list(layers)


def _affine(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight: Tensor = layer.weight
    return weight, torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias


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

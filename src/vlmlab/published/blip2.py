"""BLIP-2 (arXiv 2301.12597): tower, pretrained Q-Former, one linear layer, a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.tower import TowerEncoder
from vlmlab.model.vlm import VLM
from vlmlab.published.base import Exportable, Keys, only


class Blip2(Exportable):
    """``Blip2ForConditionalGeneration`` with a causal language model (OPT, LLaMA).

    The norm after the tower is the connector's here, where it trains with the Q-Former, as in the paper's code.
    """

    model = Blip2ForConditionalGeneration
    goes_on = False

    def keys(self, config: Any) -> Keys:
        """All tokens of the tower before its norm, and ``qformer``."""
        if not config.use_decoder_only_language_model:
            raise UserError(f"its language model ({config.text_config.model_type}) has an encoder; lm=hf is a decoder")
        queries = config.qformer_config
        only(
            queries, "its Q-Former",
            intermediate_size=4 * queries.hidden_size, hidden_act="gelu", layer_norm_eps=1e-12,
            use_qformer_text_input=False, attention_probs_dropout_prob=queries.hidden_dropout_prob,
        )  # fmt: skip
        return {
            "encoder.layers": [-1],
            "encoder.class_token": True,
            "connector": "qformer",
            "connector.queries": config.num_query_tokens,
            "connector.hidden": queries.hidden_size,
            "connector.layers": queries.num_hidden_layers,
            "connector.heads": queries.num_attention_heads,
            "connector.cross_every": queries.cross_attention_frequency,
            "connector.dropout": queries.hidden_dropout_prob,
            "connector.norm_eps": config.vision_config.layer_norm_eps,
            "mask": "causal",
        }

    def tower(self, model: Any) -> PreTrainedModel:
        """As it is; its norm is not read."""
        return model.vision_model

    def lm(self, model: Any) -> PreTrainedModel:
        """A causal LM already."""
        return model.language_model

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """The tower's norm, the queries, the Q-Former and the linear layer after it."""
        parts = {
            "norm": model.vision_model.post_layernorm,
            "qformer": model.qformer,
            "out": model.language_projection,
        }
        weights = {f"{part}.{name}": w for part, module in parts.items() for name, w in module.state_dict().items()}
        return {"queries": model.query_tokens, **weights}

    def lacks(self, model: VLM) -> str | None:
        """Other towers than its own, read after its last layer with the class token; other connectors."""
        encoder, connector = model.encoder, model.connector
        if type(connector) is not QFormerConnector or connector.reads_text:
            return "has a Q-Former of queries alone"
        if not isinstance(encoder, TowerEncoder) or not isinstance(encoder.tower, Blip2VisionModel):
            return "has BLIP-2's own vision tower"
        settings: Any = encoder.tower.config
        if encoder.layers != [settings.num_hidden_layers] or not encoder.class_token:
            return "reads all tokens of the last layer (encoder.layers=[-1] encoder.class_token=true)"
        if connector.norm.eps != settings.layer_norm_eps:
            return f"has one epsilon in its norms (connector.norm_eps={settings.layer_norm_eps:g})"
        return None

    def config_of(self, model: VLM, tower: PreTrainedModel) -> PreTrainedConfig:
        """BLIP-2's."""
        connector: Any = model.connector
        return Blip2Config(
            vision_config=tower.config.to_dict(),
            qformer_config=connector.qformer.config.to_dict(),
            text_config=model.lm.model.config.to_dict(),
            num_query_tokens=connector.queries.shape[1],
            image_token_index=model.lm.image_id,
        )

    def place(self, whole: Any, model: VLM, tower: PreTrainedModel) -> None:
        """Tower with the connector's norm, Q-Former, the layer after it, and the language model."""
        connector: Any = model.connector
        whole.vision_model = tower
        whole.vision_model.post_layernorm = connector.norm
        whole.qformer, whole.query_tokens = connector.qformer, connector.queries
        whole.language_projection, whole.language_model = connector.out, model.lm.model

"""PaliGemma (arXiv 2407.07726): SigLIP, one linear layer, Gemma; images and prompt see each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vlmlab.connector.linear import LinearConnector
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Mask
from vlmlab.model.vlm import VLM
from vlmlab.published.base import Exportable, Keys, auto_tower, causal_lm, plain_lm
from vlmlab.published.mask_code import is_of_prefixes


class PaliGemma(Exportable):
    """``PaliGemmaForConditionalGeneration``: read with Gemma, written with any language model of rotary positions.

    Its own mask is ``prefix_lm`` where a conversation has one question: what ``token_type_ids`` calls 0 is the prefix.
    A later question would have earlier answers in it, which is not what the lab's rule says of them.
    """

    model = PaliGemmaForConditionalGeneration
    goes_on = False
    alone = True

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

    def follows(self, mask: Mask) -> bool:
        """Its prefix sees itself."""
        return is_of_prefixes(mask)

    def lacks(self, model: VLM) -> str | None:
        """Other connectors than a linear layer, other features than a tower's final patches."""
        encoder: Any = model.encoder
        settings: Any = model.lm.model.config
        if type(model.connector) is not LinearConnector:
            return "has a linear layer"
        if not auto_tower(encoder.tower) or encoder.special or encoder.layers is not None:
            return "reads the final patches of towers that AutoModel makes (encoder.layers=null)"
        if not isinstance(encoder.tower.config.image_size, int):
            return "has square images"
        if getattr(settings, "rope_parameters", None) is None:
            return "counts positions from one, which changes nothing of rotary ones alone"
        if getattr(settings, "sliding_window", None) is not None:
            return "sees no window"
        return plain_lm(model)

    def config_of(self, model: VLM, tower: PreTrainedModel) -> PreTrainedConfig:
        """PaliGemma's."""
        text = copy.deepcopy(model.lm.model.config)
        text.use_bidirectional_attention = True  # asked of every config, and Gemma's alone has it
        return PaliGemmaConfig(
            vision_config=copy.deepcopy(tower.config),
            text_config=text,
            image_token_index=model.lm.image_id,
            vocab_size=text.vocab_size,
            projection_dim=model.lm.width,
            hidden_size=model.lm.width,
            tie_word_embeddings=text.tie_word_embeddings,
        )

    def place(self, whole: Any, model: VLM, tower: PreTrainedModel) -> None:
        """Tower, linear layer, layers and head."""
        lm: Any = model.lm.model
        connector: Any = model.connector
        whole.model.vision_tower, whole.model.language_model = tower, lm.base_model
        whole.model.multi_modal_projector.linear = connector.layer
        whole.lm_head = lm.get_output_embeddings()

    def processor(self, model: VLM) -> ProcessorMixin:
        """The usual one; its tokenizer says that all tokens of a prompt are of the prefix."""
        found: Any = super().processor(model)
        tokenizer = found.tokenizer
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = [*names, "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # without which it is not saved
        return found

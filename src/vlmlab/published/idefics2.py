"""Idefics2 (arXiv 2405.02246) at one image size: SigLIP, gated MLP, perceiver, Mistral."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    AutoTokenizer,
    DeepseekVLProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipVisionModel,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from vlmlab.connector.idefics2 import Idefics2Connector
from vlmlab.model.vlm import VLM
from vlmlab.published.base import Exportable, Keys, causal_lm, image_processor, only, plain_lm
from vlmlab.published.prompts import with_parts

VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
"""Settings that its tower shares with SigLIP's."""


class Idefics2(Exportable):
    """``Idefics2ForConditionalGeneration``; images of their own size and their crops are not reproduced.

    It is written with its own image processor at one size. Its own processor of words puts two further words around an
    image and a blank after them, so that another of transformers is used, which writes placeholders alone.
    """

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

    def lacks(self, model: VLM) -> str | None:
        """Other towers than SigLIP's, other connectors, images that are padded or cut."""
        encoder: Any = model.encoder
        connector = model.connector
        if type(connector) is not Idefics2Connector:
            return "has a perceiver"
        if not isinstance(encoder.tower, SiglipVisionModel | Idefics2VisionTransformer) or encoder.layers is not None:
            return "reads the final patches of SigLIP (encoder.layers=null)"
        preprocess: Any = encoder.preprocess
        if preprocess.square or preprocess.shortest_edge is not None or preprocess.squeeze is not None:
            return "pads and cuts no image to one size (encoder.square=false)"
        settings: Any = model.lm.model.config
        wide = getattr(settings, "intermediate_size", None)
        if getattr(settings, "hidden_act", None) != "silu" or connector.mlp.gate_proj.out_features != wide:
            return f"has a gated MLP like its language model's (connector.hidden={wide})"
        return plain_lm(model)

    def config_of(self, model: VLM, tower: PreTrainedModel) -> PreTrainedConfig:
        """Idefics2's."""
        connector: Any = model.connector
        text = model.lm.model.config
        return Idefics2Config(
            vision_config={name: getattr(tower.config, name) for name in VISION},
            perceiver_config=connector.resampler.config.to_dict(),
            text_config=text.to_dict(),
            image_token_id=model.lm.image_id,
            tie_word_embeddings=text.tie_word_embeddings,
        )

    def place(self, whole: Any, model: VLM, tower: PreTrainedModel) -> None:
        """Projection, perceiver, layers and head; the tower's values go into one of its own class."""
        lm: Any = model.lm.model
        connector: Any = model.connector
        vision = Idefics2VisionTransformer._from_config(whole.config.vision_config)
        values = tower.state_dict()
        vision.load_state_dict({name: values[name] for name in vision.state_dict()})  # all but a pooling head
        whole.model.vision_model, whole.model.text_model = vision, lm.base_model
        whole.model.connector.modality_projection = connector.mlp
        whole.model.connector.perceiver_resampler = connector.resampler
        whole.lm_head = lm.get_output_embeddings()

    def processor(self, model: VLM) -> ProcessorMixin:
        """Its own image processor, which gives a list of images for every conversation, and placeholders alone."""
        encoder: Any = model.encoder
        tokenizer, token = model.lm.plain_tokenizer, model.lm.image_token
        tokenizer.padding_side = "left"
        template = with_parts(tokenizer, token)
        with tempfile.TemporaryDirectory() as place:  # it looks for the placeholder there
            tokenizer.save_pretrained(place)
            tokenizer = AutoTokenizer.from_pretrained(place, extra_special_tokens={"image_token": token})
        return DeepseekVLProcessor(
            image_processor=image_processor(encoder.preprocess, "Idefics2ImageProcessor", do_image_splitting=False),
            tokenizer=tokenizer,
            chat_template=template,
            num_image_tokens=model.tokens_per_image,
        )

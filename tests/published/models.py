"""Tiny published models with random weights, saved as their own folders, and how each is asked for its logits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.tiny import HALF, SIZE, VISION, root, spread, text_config, tokenizer
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2VisionConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlmlab.contracts.tensors import Batch, Role
from vlmlab.towers.source import quiet

IMAGE = "<|image|>"
SQUARE = {"size": {"height": SIZE, "width": SIZE}, "resample": 3, **HALF}


def image_id() -> int:
    found = tokenizer().convert_tokens_to_ids(IMAGE)
    assert isinstance(found, int)
    return found


def save(model: PreTrainedModel, name: str, settings: dict[str, Any] | None = None, template: bool = True) -> Path:
    """A folder as the model's makers would publish it."""
    folder = root() / f"published-{name}"
    with quiet():
        spread(model, seed=7).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if not template:
        (folder / "chat_template.jinja").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings or SQUARE))
    return folder


def llava_config(**changes: Any) -> LlavaConfig:
    given = {
        "vision_config": CLIPVisionConfig(**VISION),
        "text_config": LlamaConfig(**text_config()),
        "image_token_id": image_id(),
        **changes,
    }
    return LlavaConfig(**given)


@cache
def llava() -> Path:
    return save(LlavaForConditionalGeneration(llava_config()), "llava")


@cache
def llava_full() -> Path:
    """The class token among the visual tokens, two layers, no biases, tied embeddings."""
    config = llava_config(
        text_config=Qwen2Config(**text_config(tie_word_embeddings=True)),
        vision_feature_select_strategy="full",
        vision_feature_layer=[-2, 1],
        multimodal_projector_bias=False,
    )
    return save(LlavaForConditionalGeneration(config), "llava-full")


@cache
def llava_siglip() -> Path:
    config = llava_config(
        vision_config=SiglipVisionConfig(**VISION), vision_feature_select_strategy="full", vision_feature_layer=-1
    )
    return save(LlavaForConditionalGeneration(config), "llava-siglip")


def blip2(text: Any, name: str) -> Path:
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            cross_attention_frequency=2,
            encoder_hidden_size=32,
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=5,
        image_token_index=image_id(),
    )
    return save(Blip2ForConditionalGeneration(config), name)


@cache
def blip2_opt() -> Path:
    kept = {key: value for key, value in text_config().items() if key != "intermediate_size"}
    return blip2(OPTConfig(**kept, ffn_dim=48, word_embed_proj_dim=32), "blip2-opt")


@cache
def blip2_llama() -> Path:
    return blip2(LlamaConfig(**text_config()), "blip2-llama")


@cache
def paligemma() -> Path:
    text = {**text_config(head_dim=8), "model_type": "gemma", "tie_word_embeddings": True}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=image_id(),
        projection_dim=32,
    )
    return save(PaliGemmaForConditionalGeneration(config), "paligemma")


@cache
def idefics2() -> Path:
    """Its processor keeps sizes and cuts tiles, as the released one."""
    config = Idefics2Config(
        text_config=MistralConfig(**text_config(sliding_window=None)).to_dict(),
        vision_config=VISION,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=image_id(),
    )
    native = {"size": {"longest_edge": 980, "shortest_edge": 378}, "do_pad": True, "do_image_splitting": True}
    return save(Idefics2ForConditionalGeneration(config), "idefics2", {**native, **HALF, "resample": 2})


def ovis2(stride: int = 2, **vision: Any) -> Ovis2Config:
    sizes = {key: value for key, value in VISION.items() if key != "image_size"}
    tower = Ovis2VisionConfig(**sizes, image_size=SIZE, vocab_size=25, hidden_stride=stride, **vision)
    marks = tokenizer().convert_tokens_to_ids(list("#$%&*"))  # in none of the samples
    return Ovis2Config(
        vision_config=tower.to_dict(),
        text_config=Qwen2Config(**text_config()).to_dict(),
        hidden_size=32,
        vocab_size=len(tokenizer()),
        image_token_id=image_id(),
        visual_indicator_token_ids=marks,
        tie_word_embeddings=False,
    )


@cache
def llava_onevision() -> Path:
    """Its processor cuts tiles."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**text_config()),
        image_token_index=image_id(),
        video_token_index=tokenizer().convert_tokens_to_ids("#"),
    )
    settings = {**SQUARE, "image_grid_pinpoints": [[SIZE, SIZE]], "do_pad": True}
    return save(LlavaOnevisionForConditionalGeneration(config), "llava-onevision", settings)


@cache
def ovis2_folder() -> Path:
    return save(Ovis2ForConditionalGeneration(ovis2()), "ovis2", {**SQUARE, "crop_to_patches": True})


MODELS: dict[str, Any] = {
    "llava": llava,
    "llava_full": llava_full,
    "llava_siglip": llava_siglip,
    "blip2_opt": blip2_opt,
    "blip2_llama": blip2_llama,
    "paligemma": paligemma,
    "idefics2": idefics2,
    "ovis2": ovis2_folder,
    "llava_onevision": llava_onevision,
}
ONE_SIZE = ("idefics2", "ovis2", "llava_onevision")
"""Those whose processors have no single size, so that one has to be given."""


def their_inputs(theirs: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """A batch of ours as the published model wants it."""
    pixels = (batch.pixels.float() / 255 - 0.5) / 0.5
    given = {
        "input_ids": batch.input_ids,
        "pixel_values": pixels,
        "attention_mask": batch.layout.valid.long(),
    }
    if isinstance(theirs, PaliGemmaForConditionalGeneration):
        started = batch.layout.role.eq(Role.ANSWER).cumsum(1) > 0
        given["position_ids"] = batch.layout.position
        given["token_type_ids"] = started.long().masked_fill(~batch.layout.valid, 1)
    if isinstance(theirs, Idefics2ForConditionalGeneration):
        given["pixel_values"] = pixels[None]  # their order is that of the placeholders
    if isinstance(theirs, LlavaOnevisionForConditionalGeneration):  # as it reads several images: one tile each
        given["pixel_values"] = pixels[:, None]
        given["image_sizes"] = torch.full((len(pixels), 2), SIZE)
        given["batch_num_images"] = torch.tensor([len(pixels)])
    if isinstance(theirs, Ovis2ForConditionalGeneration):
        given["input_ids"] = with_indicators(theirs, batch)
    return given


def with_indicators(theirs: Ovis2ForConditionalGeneration, batch: Batch) -> Tensor:
    """Begin, grid and end words around every image, which are among the connector's tokens here."""
    ids, marks = batch.input_ids.clone(), theirs.config.visual_indicator_token_ids
    table = batch.images
    for row, place in zip(table.row.tolist(), table.place.tolist(), strict=True):
        own = (batch.layout.image[row] == batch.layout.image[row, place]).nonzero().flatten()
        ids[row, own[[0, -2, -1]]] = torch.tensor([marks[0], marks[1], marks[4]])
    return ids

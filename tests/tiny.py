"""Random tiny towers, samples and layouts that the tests share; towers are saved once per process as real folders."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmlab.connector.mlp import MlpConnector
from vlmlab.contracts.parts import Mask
from vlmlab.contracts.sample import Image, Sample, Turn
from vlmlab.contracts.tensors import Batch, Layout
from vlmlab.data.chat import ChatEncoder
from vlmlab.data.collate import Collator
from vlmlab.encoder.hf import HfEncoder
from vlmlab.engine.proof import fingerprints
from vlmlab.engine.weights import StagedModel
from vlmlab.fusion.concat import ConcatFusion
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.lm.tokenizer import train_tokenizer
from vlmlab.mask.bidir import Bidirectional
from vlmlab.model.build import build_collator
from vlmlab.model.vlm import VLM

CONF = Path(__file__).parent.parent / "conf"
SIZE, PATCH = 64, 16
WORDS = ("what colour is the big round thing", "red", "blue", "two green squares", "how many are there", "yes", "no")


@cache
def root() -> Path:
    """A folder that lives as long as the process."""
    folder = tempfile.mkdtemp(prefix="vlmlab-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def spread(model: nn.Module, seed: int = 0, scale: float = 0.15) -> nn.Module:
    """Random weights large enough that every attention row matters (0.02 would hide a wrong mask)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if parameter.dim() == 1 and "norm" in name and "weight" in name else noise)
    return model.eval()


def save(model: PreTrainedModel, name: str, preprocess: dict[str, Any] | None = None) -> Path:
    folder = root() / name
    spread(model).save_pretrained(folder)
    if preprocess is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@cache
def siglip() -> Path:
    """A SigLIP vision tower with its pooling head, 64 px, 16 patches of 16 px."""
    size = {"size": {"height": SIZE, "width": SIZE}, "resample": 3, **HALF}
    return save(SiglipVisionModel(SiglipVisionConfig(**VISION)), "siglip", size)


@cache
def clip() -> Path:
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, **CLIP_STATISTICS}
    return save(CLIPVisionModel(CLIPVisionConfig(**VISION)), "clip", {**size, "resample": 3, "do_center_crop": True})


@cache
def two_towers() -> Path:
    """A CLIP of both towers: the vision tower of `clip`'s shape, and a text tower with the tiny tokenizer."""
    text = {"vocab_size": len(tokenizer()), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": tokenizer().eos_token_id,
            "bos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id}  # fmt: skip
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, **CLIP_STATISTICS}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    folder = save(model, "two_towers", {**size, "resample": 3, "do_center_crop": True})
    tokenizer().save_pretrained(folder)
    return folder


@cache
def dinov2() -> Path:
    config = Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}, mlp_ratio=2)
    size = {"size": {"shortest_edge": 80}, "crop_size": {"height": SIZE, "width": SIZE}, "resample": 3, **IMAGENET}
    return save(Dinov2Model(config), "dinov2", size)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """ChatML with generation markers."""
    return train_tokenizer([*WORDS] * 3, 330)


def text_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer().eos_token_id,
        "pad_token_id": tokenizer().pad_token_id,
        "tie_word_embeddings": False,
        **changes,
    }


def save_lm(model: PreTrainedModel, name: str) -> Path:
    folder = save(model, name)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def qwen2() -> Path:
    """Four layers of grouped-query attention."""
    return save_lm(Qwen2ForCausalLM(Qwen2Config(**text_config())), "qwen2")


@cache
def sliding_qwen2() -> Path:
    """Qwen2 whose upper two layers see a window of 5 tokens."""
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    return save_lm(Qwen2ForCausalLM(Qwen2Config(**text_config(**window))), "sliding_qwen2")


@cache
def llama() -> Path:
    """Llama's layers."""
    return save_lm(LlamaForCausalLM(LlamaConfig(**text_config())), "llama")


@cache
def gemma3() -> Path:
    """A Gemma-3 text model; every other layer sees a window of 24 tokens."""
    layers = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(**text_config(head_dim=8, sliding_window=24, layer_types=layers))
    return save_lm(Gemma3ForCausalLM(config), "gemma3")


# -- samples and batches -----------------------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image:
    """Random pixels, (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


ONE_TURN = Sample("one", (picture(1),), (Turn("what colour is it", "two green squares"),))
TWO_TURNS = Sample("two", (picture(2),), (Turn("how many", "red blue"), Turn("what", "green two")))
SECOND_TURN = Sample("second", (picture(3),), (Turn("is there", "yes no"), Turn("<image>what", "big blue")))
TWO_IMAGES = Sample(
    "images", (picture(4), picture(5)), (Turn("see <image> what", "no red"), Turn("and <image> how", "round thing"))
)
ADJACENT = Sample("adjacent", (picture(6), picture(7)), (Turn("<image><image>which", "green"),))
TEXT_ONLY = Sample("text", (), (Turn("how many", "two red things are there"),))
QUESTIONS = Sample(
    "questions",
    (picture(8),),
    (Turn("how many are there", "red blue"), Turn("how many", "two"), Turn("what colour", "big green thing")),
)
TAGGED = Sample(
    "tagged", (picture(9), picture(10)), (Turn("<image> <image>\nwhat is big", "no red"), Turn("where", "yes"))
)
SAMPLES = (ONE_TURN, TWO_TURNS, SECOND_TURN, TWO_IMAGES, ADJACENT, TEXT_ONLY)


def chat(tokens_per_image: int = 3, prompt: Any = "chat") -> ChatEncoder:
    return ChatEncoder(tokenizer(), "<|image|>", tokens_per_image, prompt)


def batches() -> dict[str, Batch]:
    """The layouts that every mask is held to, built by the real collator with 3 visual tokens per image."""
    plain = Collator(encoder=chat(), resize=_chw, pad_id=tokenizer().pad_token_id)
    packed = Collator(encoder=chat(), resize=_chw, pad_id=tokenizer().pad_token_id, pack_length=1000)
    encoded = [plain.encoder.train(sample) for sample in SAMPLES]
    alone = [[i] for i in range(len(SAMPLES))]
    return {
        "one turn": plain([ONE_TURN]),
        "two turns": plain([TWO_TURNS]),
        "image in turn two": plain([SECOND_TURN]),
        "image in each turn": plain([TWO_IMAGES]),
        "packed": packed([TWO_IMAGES, ONE_TURN, SECOND_TURN]),
        "right padding": plain(SAMPLES),
        "left padding": plain._batch(SAMPLES, encoded, alone, left=True),
    }


def trees() -> Batch:
    """Two rows: a tree with a text after it, and two packed trees, the first one of two images."""
    plain = Collator(encoder=chat(), resize=_chw, pad_id=tokenizer().pad_token_id, pack_length=100, questions="tree")
    batch = plain([QUESTIONS, TEXT_ONLY, TAGGED, TWO_TURNS])
    assert batch.sample_ids == [["questions", "text"], ["tagged", "two"]]
    return batch


def layouts() -> dict[str, Layout]:
    return {name: batch.layout for name, batch in batches().items()}


def _chw(image: Image) -> Image:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


# -- models ------------------------------------------------------------------------------------------------------------


def vlm(
    mask: Mask | None = None,
    connector: nn.Module | None = None,
    lm: nn.Module | None = None,
    encoder: nn.Module | None = None,
    fusion: nn.Module | None = None,
) -> VLM:
    """Random SigLIP (penultimate layer), two-layer connector, concatenation, Qwen2; the same weights every time."""
    encoder = encoder or HfEncoder(str(siglip()), layers=[-2])
    lm = lm or HfLanguageModel(str(qwen2()))
    connector = connector or spread(MlpConnector(encoder.width, lm.width), seed=1)
    return VLM(encoder, connector, fusion or ConcatFusion(), lm, mask or Bidirectional()).eval()


def collator(model: VLM, prompt: Any = "chat", pack_length: int | None = None) -> Collator:
    """Conversations as they are, also for what reads the question."""
    collate = {"max_length": 512, "pack_length": pack_length, "questions": "whole"}
    return build_collator(OmegaConf.create({"collate": collate}), model, prompt)


def choices(group: str) -> list[Path]:
    """Every YAML of a group."""
    found = sorted((CONF / group).glob("*.yaml"))
    assert found, f"conf/{group} is empty"
    return found


def loaded(path: Path) -> DictConfig:
    """A YAML with what it inherits from files of its own group; what it takes from other groups is left out."""
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    bases = [base for base in node.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    inherited = [loaded(path.parent / f"{base.partition('@')[0]}.yaml") for base in bases]
    merged = OmegaConf.merge(*inherited, node)
    assert isinstance(merged, DictConfig)
    return merged


def worst(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).detach().abs().max())


def supervised(batch: Batch) -> list[list[int]]:
    """The supervised ids of every row."""
    return [[int(i) for i in row if i != -100] for row in batch.labels]


def all_samples(*names: str) -> Sequence[Sample]:
    return [s for s in SAMPLES if s.id in names] if names else SAMPLES


def seen(staged: StagedModel) -> dict[str, str]:
    """What a checkpoint says of the weights before training, were they as they are now."""
    return fingerprints({**staged.live(), **staged.frozen()}.items())

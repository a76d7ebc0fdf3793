"""LMs that name weights of the hub, without a network: their architecture at full size on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny
from tests.tiny import ONE_TURN, choices, qwen2, save, text_config, tokenizer, worst
from transformers import GemmaConfig, GemmaForCausalLM

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.chat import IGNORE, ChatEncoder
from vlmlab.lm.hf import HfLanguageModel

HUB = [path for path in choices("lm") if "architecture" in tiny.loaded(path)]
COUNT = {  # weights as the hub counts them, a head that is tied to the embeddings once
    "qwen2_0_5b": 494_032_768,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "phi3_mini": 3_821_079_552,
    "tinyllama": 1_100_048_384,
    "vicuna_7b": 6_738_415_616,
    "gemma_2b": 2_506_172_416,
}


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_the_architecture_of_an_id(path: Path) -> None:
    config = tiny.loaded(path)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", config.path)
    with torch.device("meta"):
        lm = instantiate(config)
    assert sum(p.numel() for p in lm.parameters()) == COUNT[path.stem]
    assert {p.device.type for p in lm.parameters()} == {"meta"} and lm.source is None and not lm.own_tokenizer
    tied = lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert tied == config.architecture.tie_word_embeddings
    assert lm.width == config.architecture.hidden_size
    spare = config.architecture.vocab_size - lm.model.get_input_embeddings().num_embeddings
    assert spare == 0, "no row is added where the tokenizer is not known"


def test_every_id_has_its_count() -> None:
    assert set(COUNT) == {path.stem for path in HUB}


def test_an_unknown_id_without_an_architecture_is_named() -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"lm\.path=no/such is neither"):
        HfLanguageModel("no/such")


def test_a_folder_is_read_without_its_weights(tmp_path: Path) -> None:
    for path in qwen2().iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with torch.device("meta"):
        lm = HfLanguageModel(str(tmp_path), image_token="<picture>")
    loaded = HfLanguageModel(str(qwen2()), image_token="<picture>")
    assert {n: p.shape for n, p in lm.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert lm.own_tokenizer and lm.image_id == loaded.image_id


def test_gemma_scales_its_embeddings_and_keeps_doing_so_with_a_new_row() -> None:
    config = GemmaConfig(**{**text_config(tie_word_embeddings=True), "vocab_size": len(tokenizer())}, head_dim=8)
    folder = save(GemmaForCausalLM(config), "gemma")
    tokenizer().save_pretrained(folder)
    lm = HfLanguageModel(str(folder), image_token="<picture>")
    ids = torch.tensor([[5, lm.image_id]])
    table = lm.model.get_input_embeddings().weight
    assert len(table) == len(tokenizer()) + 1
    assert worst(lm.embed(ids)[0], table[ids[0]] * 32**0.5) < 1e-6


def rendered(name: str, sample: Sample) -> tuple[str, list[str]]:
    """Text and supervised words of a conversation by the template that a file of conf/lm brings."""
    template = OmegaConf.load(next(path for path in HUB if path.stem == name)).chat_template
    made = HfLanguageModel(str(qwen2()), chat_template=template).tokenizer
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    encode = ChatEncoder(made, "<|image|>", 2)
    encoded = encode.train(sample)
    end = made.eos_token_id
    words: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORE:
            words[-1].append(label)
        if label == end:
            words.append([])
    return made.decode(encoded.ids), [made.decode(part) for part in words if part]


TALK = Sample("talk", (), (Turn("what", "red"), Turn("and how", "two green")))


def test_vicuna_speaks_as_llava_1_5_does() -> None:
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text, words = rendered("vicuna_7b", TALK)
    assert text == f"<s>{system} USER: what ASSISTANT: red</s>USER: and how ASSISTANT: two green</s>"
    assert words == [" red</s>", " two green</s>"]


def test_gemma_is_asked_as_paligemma_is() -> None:
    text, words = rendered("gemma_2b", ONE_TURN)
    assert text == "<|image|><|image|><s>what colour is it\ntwo green squares</s>"
    assert words == ["two green squares</s>"]

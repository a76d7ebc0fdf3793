"""Our adapters against peft's own models with the same random weights, fp32, within 1e-5."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tests.tiny import TWO_TURNS, batches, chat, clip, qwen2, worst
from torch import nn
from transformers import CLIPVisionModel

from vlmlab.adapter.base import switch
from vlmlab.adapter.comp_lora import CompLoraAdapter
from vlmlab.adapter.ia3 import Ia3Adapter
from vlmlab.adapter.ln_tuning import LnTuningAdapter
from vlmlab.adapter.lora import LoraAdapter
from vlmlab.adapter.soft_prompt import SoftPromptAdapter
from vlmlab.data.collate import _lay_out, _prompted
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.causal import Causal

LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj", "fc2"], "feedforward_modules": ["down_proj", "fc2"]}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
PAIRS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraAdapter(r=3, alpha=6), LoraConfig(**LORA)),
    "rslora": (LoraAdapter(r=3, alpha=6, rslora=True), LoraConfig(**LORA, use_rslora=True)),
    "pissa": (LoraAdapter(r=3, alpha=6, pissa=True), LoraConfig(**LORA, init_lora_weights="pissa")),
    "dora": (LoraAdapter(r=3, alpha=6, dora=True), LoraConfig(**LORA, use_dora=True)),
    "ia3": (Ia3Adapter(targets=["k_proj", "v_proj", "fc2"], feedforward=["down_proj", "fc2"]), IA3Config(**IA3)),
    "ln_tuning": (LnTuningAdapter(), LNTuningConfig(target_modules=NORMS)),
}


@torch.no_grad()
def stir(model: nn.Module, names: set[str]) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if name not in names:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_the_lm_with_an_adapter_is_pefts(kind: str) -> None:
    ours, theirs = PAIRS[kind]
    lm = HfLanguageModel(str(qwen2())).eval()
    other = get_peft_model(copy.deepcopy(lm.model), copy.deepcopy(theirs)).eval()
    lm.model = ours.wrap(lm.model)
    base = {n for n in dict(lm.named_parameters()) if "base_layer" in n or "default" not in n}
    stir(lm, base)
    assert len(base) < len(list(lm.named_parameters()))
    loaded = other.base_model.model.load_state_dict(lm.model.state_dict(), strict=True)
    assert not loaded.missing_keys
    batch = batches()["right padding"]
    valid = batch.layout.valid
    want = other(input_ids=batch.input_ids, attention_mask=valid.long()).logits[valid]
    got = lm.logits(lm.states(lm.embed(batch.input_ids), batch.layout, Causal()))[valid]
    assert worst(got, want) < 1e-5 * max(1.0, float(want.abs().max()))
    switch(lm.model, None)
    off = lm.logits(lm.states(lm.embed(batch.input_ids), batch.layout, Causal()))[valid]
    assert worst(off, want) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@torch.no_grad()
def test_the_encoder_with_an_adapter_is_pefts(kind: str) -> None:
    ours, theirs = PAIRS[kind]
    tower = CLIPVisionModel.from_pretrained(clip()).eval()
    other = get_peft_model(copy.deepcopy(tower), copy.deepcopy(theirs)).eval()
    wrapped = ours.wrap(tower)
    stir(wrapped, {n for n in dict(wrapped.named_parameters()) if "base_layer" in n or "default" not in n})
    other.base_model.model.load_state_dict(wrapped.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 64, 64)
    assert worst(wrapped(pixels).last_hidden_state, other(pixel_values=pixels).last_hidden_state) < 1e-5


@torch.no_grad()
def test_comp_lora_without_protection_is_pefts_lora() -> None:
    lm = HfLanguageModel(str(qwen2())).eval()
    other = get_peft_model(copy.deepcopy(lm.model), LoraConfig(**LORA)).eval()
    lm.model = CompLoraAdapter(r=3, k=0, alpha=6).wrap(lm.model)
    stir(other, {n for n, _ in other.named_parameters() if "lora_" not in n})
    layers = {n: m for n, m in other.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    for name, layer in layers.items():
        update = lm.model.get_submodule(name).adapters["default"]
        update.a.weight.copy_(layer.lora_A["default"].weight)
        update.b.weight.copy_(layer.lora_B["default"].weight)
    assert len(layers) == 4 * 7
    switch(lm.model, "default")
    batch = batches()["right padding"]
    valid = batch.layout.valid
    want = other(input_ids=batch.input_ids, attention_mask=valid.long()).logits[valid]
    got = lm.logits(lm.states(lm.embed(batch.input_ids), batch.layout, Causal()))[valid]
    assert worst(got, want) < 1e-5 * max(1.0, float(want.abs().max()))


@torch.no_grad()
def test_soft_prompts_are_pefts_prompt_tuning() -> None:
    """Under the causal mask and without padding, where peft's work."""
    lm = HfLanguageModel(str(qwen2())).eval()
    other = get_peft_model(copy.deepcopy(lm.model), PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()
    lm.model = SoftPromptAdapter(length=3).wrap(lm.model)
    switch(lm.model, "default")
    prompt = lm.model.get_input_embeddings().adapters["default"]
    other.prompt_encoder["default"].embedding.weight.copy_(prompt.weight)
    encoded = chat().train(TWO_TURNS)
    ids, _, layout = _lay_out([[_prompted(encoded, 3)]], 0, False)
    plain = torch.tensor([encoded.ids])
    want = other(input_ids=plain, attention_mask=torch.ones_like(plain)).logits
    got = lm.logits(lm.states(lm.embed(ids), layout, Causal()))
    assert worst(got, want) < 1e-5 * max(1.0, float(want.abs().max()))


def test_the_rates_of_lora_plus_are_pefts() -> None:
    lm = HfLanguageModel(str(qwen2())).requires_grad_(False)
    ours = LoraAdapter(r=3, lr_ratio=8.0)
    lm.model = ours.wrap(lm.model)
    groups = create_loraplus_optimizer(lm.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0).param_groups
    theirs = {id(p) for g in groups for p in g["params"] if g["lr"] == 8e-3}
    ratios = ours.ratios(lm.model)
    assert {id(p) for p in ratios} == theirs and set(ratios.values()) == {8.0} and len(theirs) == 28

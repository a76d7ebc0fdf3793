"""Adapters: peft's own mathematics, equal to the tower before the first update, mergeable, per tower."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hydra.utils import instantiate
from peft import LoraConfig, get_peft_model
from tests import tiny
from tests.tiny import ONE_TURN, TWO_IMAGES, TWO_TURNS, batches, choices, clip, collator, gemma3, qwen2, vlm, worst
from torch import nn

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch
from vlmlab.encoder.hf import HfEncoder
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.mask.bidir import Bidirectional
from vlmlab.mask.causal import Causal
from vlmlab.model.vlm import VLM


def stirred(module: nn.Module, seed: int = 3) -> int:
    """Random values in every adapter tensor; returns how many there are."""
    generator = torch.Generator().manual_seed(seed)
    found = [p for n, p in sorted(module.named_parameters()) if "lora_" in n]
    with torch.no_grad():
        for p in found:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return len(found)


def states(lm: HfLanguageModel, batch: Batch) -> torch.Tensor:
    return lm.states(lm.embed(batch.input_ids), batch.layout, Bidirectional())


@torch.no_grad()
def test_lora_is_pefts() -> None:
    lm = HfLanguageModel(str(qwen2())).eval()
    base = copy.deepcopy(lm.model)
    lm.model = LoraAdapter(r=4, alpha=12).wrap(lm.model)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert stirred(lm) == 4 * 7 * 2  # layers, linear layers of each, A and B; not the head
    ours = dict(lm.model.named_parameters())
    missing = theirs.base_model.model.load_state_dict(ours, strict=True)
    assert not missing.missing_keys
    batch = batches()["right padding"]
    want = theirs(input_ids=batch.input_ids, attention_mask=batch.layout.valid.long()).logits
    got = lm.logits(lm.states(lm.embed(batch.input_ids), batch.layout, Causal()))
    valid = batch.layout.valid
    assert worst(got[valid], want[valid]) < 1e-5


@pytest.mark.parametrize("tower", [qwen2, gemma3], ids=lambda t: t.__name__)
@torch.no_grad()
def test_lora_formula_start_and_merge(tower: object) -> None:
    lm = HfLanguageModel(str(tower())).eval()
    batch = batches()["packed"]
    before = states(lm, batch)
    plain = copy.deepcopy(lm)
    lm.model = LoraAdapter(r=4, alpha=12).wrap(lm.model)
    assert torch.equal(states(lm, batch), before), "B is zero before the first update"
    stirred(lm)
    adapted = states(lm, batch)
    assert worst(adapted, before) > 1e-2
    for name, module in plain.model.named_modules():  # W + (alpha / r) B A by hand
        wrapped = dict(lm.model.named_modules())[name]
        if hasattr(wrapped, "lora_A"):
            module.weight += 12 / 4 * wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight
    scale = float(adapted.abs().max())
    assert worst(states(plain, batch), adapted) < 1e-5 * max(scale, 1)
    by_hand = dict(plain.model.named_modules())
    for name, module in lm.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            assert worst(module.base_layer.weight, by_hand[name].weight) < 1e-6
    assert worst(states(lm, batch), adapted) < 1e-5 * max(scale, 1)


def test_only_the_adapter_may_train() -> None:
    model = vlm()
    sizes = {part: sum(p.numel() for _, p in named) for part, named in model.parts().items()}
    model.set_adapter(LoraAdapter(parts=["lm", "encoder"], r=2))
    parts = model.parts()
    assert set(parts) == {"encoder", "encoder.base", "connector", "lm", "lm.base"}
    for part in ("lm", "encoder"):
        assert all("lora_" in name for name, _ in parts[part]) and parts[part]
        assert not any("lora_" in name for name, _ in parts[f"{part}.base"])
        assert sum(p.numel() for _, p in parts[f"{part}.base"]) == sizes[part]
    model.set_adapter(LoraAdapter(parts=["lm"], r=2))  # the next stage names it again
    assert {p: len(n) for p, n in model.parts().items()} == {p: len(n) for p, n in parts.items()}
    batch = collator(model)([ONE_TURN, TWO_IMAGES])
    stirred(model)
    model.train()(batch).logits.logsumexp(-1).sum().backward()
    for part in ("lm", "encoder", "connector"):
        assert [n for n, p in parts[part] if p.grad is None] == []


def test_a_tower_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter\.parts has text, which this composition has not"):
        vlm().set_adapter(LoraAdapter(parts=["text"]))


@pytest.mark.parametrize("path", choices("adapter"), ids=lambda p: p.stem)
@torch.no_grad()
def test_every_adapter_starts_as_the_composition_without_it(path: object) -> None:
    adapter = instantiate(tiny.loaded(path))
    model = vlm(encoder=HfEncoder(str(clip()), layers=[-2]))
    batch = collator(model)([ONE_TURN, TWO_TURNS, TWO_IMAGES])
    before = model(batch).logits
    if adapter.parts and not adapter.lm_only:
        adapter.parts = ("lm", "encoder")
    model.set_adapter(adapter)
    assert torch.equal(model.eval()(batch).logits, before) is adapter.starts_equal


@torch.no_grad()
def test_an_adapted_model_decodes_as_its_merged_twin() -> None:
    model: VLM = vlm()
    model.set_adapter(LoraAdapter(parts=["lm", "encoder"], r=4))
    stirred(model)
    batch = collator(model).ask([ONE_TURN, TWO_IMAGES])
    texts = model.eval().generate(batch, 8)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    assert model.generate(batch, 8) == texts

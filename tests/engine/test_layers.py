"""Ranges of layers, and rates that decay with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.tiny import ONE_TURN, TWO_TURNS, clip, collator, dinov2, qwen2, siglip, vlm

from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.multi import MultiEncoder
from vlmlab.encoder.patch import PatchEncoder
from vlmlab.engine.layers import check_layers, compiled, places, stacks, tower_layers
from vlmlab.engine.stage import StageModule
from vlmlab.engine.weights import StagedModel
from vlmlab.lm.hf import HfLanguageModel
from vlmlab.recipe.stage import Stage

LORA = {"_target_": "vlmlab.adapter.lora.LoraAdapter", "r": 2}
LM = {"_target_": "vlmlab.objective.lm.LanguageModelling"}
RATES = {"encoder": 1e-3, "connector": 1e-3, "lm": 1e-3}


def stage(train: dict[str, float] = RATES, **keys: Any) -> Stage:
    return Stage(0, "s", "a.B", train, "short", LM, steps=1, batch_size=1, **keys)


def entered(keys: Stage, **parts: Any) -> StagedModel:
    staged = StagedModel(vlm(**parts))
    staged.enter(keys)
    return staged


def test_stacks_are_found_in_every_family() -> None:
    for folder in (siglip(), clip(), dinov2()):
        assert [len(s) for _, s in stacks(HfEncoder(str(folder)))] == [3]
        assert [len(s) for _, s in stacks(HfEncoder(str(folder), layers=[-2]))] == [2], "the last one was cut off"
    assert [len(s) for _, s in stacks(HfLanguageModel(str(qwen2())))] == [4]
    both = MultiEncoder([HfEncoder(str(siglip()), layers=[-2]), HfEncoder(str(clip()))])
    assert [len(s) for _, s in stacks(both)] == [2, 3]


def test_compiled_layers_keep_their_names_and_come_back() -> None:
    model = vlm()
    names, layers = list(model.state_dict()), list(tower_layers(model))
    assert len(layers) == 2 + 4
    with pytest.raises(RuntimeError, match="in between"), compiled(model):
        assert list(model.state_dict()) == names
        assert all("forward" in vars(layer) for layer in layers)
        raise RuntimeError("in between")
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_range_trains_its_layers_and_nothing_else() -> None:
    staged = entered(stage(layers={"lm": (1, -2), "encoder": (-1, -1)}))
    for name, parameter in staged.model.named_parameters():
        inside = (
            name.startswith("connector.")
            or "lm.model.model.layers.1." in name
            or "lm.model.model.layers.2." in name
            or "encoder.layers.1." in name
        )
        assert parameter.requires_grad == inside == (name in staged.trained()), name
    assert set(staged.kept()) == set(staged.trained())
    assert set(staged.trained()).isdisjoint(staged.frozen())
    layers = staged.model.lm.model.model.layers
    assert [layer.training for layer in layers] == [False, True, True, False]
    module = StageModule(staged.model, stage(), {}, staged.rates)
    assert module.pending == set(staged.trained())
    groups = module.configure_optimizers().param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in staged.trained().values()}


def test_every_chosen_tensor_has_a_gradient() -> None:
    staged = entered(stage(layers={"lm": (-2, -1), "encoder": (-1, -1)}))
    outputs = staged.model(collator(staged.model)([ONE_TURN, TWO_TURNS]))
    torch.nn.functional.cross_entropy(outputs.logits, outputs.targets).backward()
    for name, parameter in staged.model.named_parameters():
        assert (parameter.grad is not None) == (name in staged.trained()), name


def test_an_adapter_trains_in_the_range_only() -> None:
    staged = entered(stage({"connector": 1e-3, "lm": 1e-3}, layers={"lm": (-2, -1)}, adapter=LORA))
    adapted = [name for name in staged.trained() if name.startswith("lm.")]
    assert adapted and all("lora" in n and (".layers.2." in n or ".layers.3." in n) for n in adapted)
    assert any("lora" in name and ".layers.0." in name for name in staged.frozen())
    assert any(".layers.0." in name for name in staged.kept()), "an adapter has no source: all of it is in the file"


def test_the_next_stage_may_train_others(tmp_path: Path) -> None:
    cfg = OmegaConf.create({})
    staged = entered(stage(layers={"lm": (0, 0)}))
    later = stage({"lm": 1e-3}, layers={"lm": (3, 3)})
    staged.enter(later)
    assert all(".layers.3." in name for name in staged.trained())
    with torch.no_grad():
        for parameter in staged.model.lm.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    staged.save(tmp_path / "model.safetensors", later, cfg)
    again = entered(stage(layers={"lm": (0, 0)}))
    again.enter(later)
    again.load(tmp_path / "model.safetensors")
    state = staged.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())
    kept = set(staged.kept())
    assert any(".layers.0." in n for n in kept) and not any(".layers.1." in n for n in kept if n.startswith("lm."))


def test_layers_that_are_not_there_are_refused() -> None:
    model = vlm()
    for ends in ((0, 4), (-5, -1), (3, -3)):
        with pytest.raises(UserError, match=r"recipe\.stages\.s\.layers\.lm=\[.*this lm has 4 layers"):
            check_layers(model, stage(layers={"lm": ends}))
    patches = vlm(encoder=PatchEncoder(image_size=64, patch_size=16))
    with pytest.raises(UserError, match="has no transformer layers"):
        check_layers(patches, stage(layers={"encoder": (0, 0)}))


def test_rates_fall_from_the_last_layer_down() -> None:
    model = vlm()
    keys = stage(layer_decay=0.5)
    module = StageModule(model, keys, {}, keys.train)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in module.configure_optimizers().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            depth = {"lm": 4, "encoder": 2, "connector": 0}[name.split(".")[0]]
            if ".layers." in name and depth:
                want = 0.5 ** (depth - 1 - int(name.split(".layers.")[1].split(".")[0]))
            else:
                want = 0.5**depth if "embed" in name else 1.0
            assert group["ratio"] == want, name


def test_without_decay_nothing_is_multiplied() -> None:
    module = StageModule(vlm(), stage(), {}, RATES)
    assert {group["ratio"] for group in module.configure_optimizers().param_groups} == {1.0}


def test_an_adapter_has_the_rate_of_its_layer() -> None:
    staged = entered(stage({"lm": 1e-3}, layer_decay=0.5, adapter={**LORA, "lr_ratio": 4.0}))
    module = StageModule(staged.model, stage({"lm": 1e-3}, layer_decay=0.5), {}, staged.rates)
    names = {id(p): n for n, p in staged.model.named_parameters()}
    for group in module.configure_optimizers().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert group["ratio"] == 0.5 ** (3 - layer) * (4.0 if "lora_B" in name else 1.0), name


def test_tied_embeddings_are_below() -> None:
    model = vlm()
    at = places(model.lm)
    assert at[id(model.lm.model.get_input_embeddings().weight)] == (-1, 4)
    assert at[id(model.lm.model.lm_head.weight)] == (3, 4)

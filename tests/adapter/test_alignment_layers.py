"""Adapters on what aligns vision and language: the connector and the fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests import tiny
from tests.adapter.test_kinds import LM_LOSS, SAMPLES, logits, stir
from tests.fusion.test_fusions import built, cache_free, questions
from tests.tiny import choices, collator, seen, spread, vlm, worst
from torch.nn import functional as F
from torch.optim import AdamW

from vlmlab.adapter.lora import LoraAdapter
from vlmlab.adapter.mma import MmaAdapter
from vlmlab.connector.qformer import QFormerConnector
from vlmlab.contracts.errors import UserError
from vlmlab.engine.weights import StagedModel
from vlmlab.lm.inside import blocks
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import Stage
from vlmlab.train.resume import content_of, load_last, save_last

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "dora": {"r": 3},
    "comp_lora": {"r": 3, "k": 2},
    "ia3": {"targets": ["query", "value"], "feedforward": ["out"]},
    "bottleneck": {"width": 4, "targets": ["output.dense", "dense"]},
    "ln_tuning": {},
}
MERGED = [kind for kind in SETTINGS if kind != "bottleneck"]


def configured(kind: str, *parts: str, **changes: Any) -> dict[str, Any]:
    path = next(path for path in choices("adapter") if path.stem == kind)
    config: dict[str, Any] = OmegaConf.to_container(tiny.loaded(path))
    return config | SETTINGS[kind] | {"parts": list(parts)} | changes


def with_queries() -> VLM:
    """A composition with a Q-Former."""
    return vlm(connector=spread(QFormerConnector(32, 32, queries=3, layers=1, heads=2, dropout=0.0), seed=1))


def stage(config: dict[str, Any], **changes: Any) -> Stage:
    given = {"train": dict.fromkeys(config["parts"], 1e-3), **changes}
    return Stage(
        index=0, name="s", module="x.X", data="d", objective=LM_LOSS, steps=3, batch_size=1, adapter=config, **given
    )  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_connectors_adapter_starts_at_zero_trains_alone_is_saved_and_merged(kind: str, tmp_path: Path) -> None:
    config = configured(kind, "connector")
    first = StagedModel(with_queries())
    model: VLM = first.model
    plain, names = logits(model), set(model.state_dict())
    first.enter(stage(config))
    assert worst(logits(model), plain) < 1e-6
    assert set(first.trained()) <= model.adapter_tensors("default") and first.trained()
    outputs = model(collator(model)(SAMPLES))
    F.cross_entropy(outputs.logits, outputs.targets).backward()
    assert [name for name, p in first.trained().items() if p.grad is None] == []
    stir(model)
    want = logits(model)
    assert worst(want, plain) > 1e-3
    first.save(tmp_path / "a.safetensors", stage(config), OmegaConf.create({}))
    optimizer = AdamW(first.trained().values())
    save_last(tmp_path / "last.ckpt", content_of(stage(config), 1, first, optimizer, {}, [], seen(first), set(), 0.0))
    for read in ("load", "load_last"):
        second = StagedModel(with_queries())
        second.enter(stage(config))
        if read == "load":
            second.load(tmp_path / "a.safetensors")
        else:
            load_last(tmp_path / "last.ckpt", stage(config), second)
        assert torch.equal(logits(second.model), want)
    model.switch(None)
    assert torch.equal(logits(model), plain)
    model.switch("default")
    if kind in MERGED:
        model.merge()
        assert set(model.state_dict()) == names
        assert worst(logits(model), want) < 1e-5 * max(1, float(want.abs().max()))
    else:
        with pytest.raises(UserError, match="cannot be merged"):
            model.merge()


@torch.no_grad()
def test_lora_on_the_connector_by_hand() -> None:
    model = vlm()
    plain = [layer for layer in model.connector.modules() if isinstance(layer, torch.nn.Linear)]
    old = [(layer.weight.clone(), layer.bias) for layer in plain]
    model.set_adapter(LoraAdapter(parts=["connector", "lm"], r=2, alpha=6))
    stir(model)
    found = [module for module in model.connector.modules() if hasattr(module, "lora_A")]
    assert len(found) == len(old) == 2
    for layer, (weight, bias) in zip(found, old, strict=True):
        x = torch.randn(5, weight.shape[1])
        update = 6 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert worst(layer(x), F.linear(x, weight + update, bias)) < 1e-5
    sizes = {part: sum(p.numel() for _, p in named) for part, named in model.parts().items()}
    assert sizes["connector"] == sum(2 * (rows + columns) for rows, columns in (w.shape for w, _ in old))


@pytest.mark.parametrize("name", ["lavi", "gated_xattn", "mixture_of_transformers", "moe", "emma"])
def test_a_fusions_adapter_acts_where_the_fusion_does(name: str) -> None:
    """Also where ports hold a plain linear map of the fusion, which its adapter wraps."""
    model = built(name)
    spread(model.fusion, seed=2)
    plain, before = logits(model), [id(block) for block in blocks(model.lm.model)]
    staged = StagedModel(model)
    config = configured("lora", "fusion")
    staged.enter(stage(config))
    assert worst(logits(model), plain) < 1e-6
    stir(model)
    outputs = model.eval()(collator(model)(SAMPLES))
    F.cross_entropy(outputs.logits, outputs.targets).backward()
    silent = [name for name, p in staged.trained().items() if p.grad is None or not p.grad.abs().sum()]
    assert silent == [] and staged.trained()
    want = logits(model)
    assert worst(want, plain) > 1e-4
    if name == "mixture_of_transformers":
        batch = questions(model)
        steps = cache_free(model, batch, 6)
        arguments = (model.embed(batch), batch.layout, model.mask, 6, model.inside(batch, model.see(batch)))
        assert model.lm.generate(*arguments, eos_token_id=-1).tolist() == steps.tolist()
    model.merge()
    assert [id(block) for block in blocks(model.lm.model)] == before
    assert worst(logits(model), want) < 1e-4 * max(1, float(want.abs().max()))


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.parts has connector and MmaAdapter wraps lm and encoder alone"):
        vlm().set_adapter(MmaAdapter(parts=["connector"]))
    for config, fits in (
        (configured("lora", "fusion"), "all-linear fits no layer of ConcatFusion"),
        (configured("ia3", "connector", targets=["k_proj"], feedforward=["fc2"]), "k_proj fits no layer of MlpConn"),
        (configured("bottleneck", "connector", targets=["o_proj"]), "o_proj fits no layer of MlpConnector"),
    ):
        with pytest.raises(UserError, match=fits):
            vlm().set_adapter(instantiate(config))


def test_a_path_may_choose_layers_of_an_adapter() -> None:
    staged = StagedModel(with_queries())
    config = configured("lora", "connector")
    staged.enter(stage(config, train={"connector.out": 1e-3}))
    assert {name.split(".lora_")[0] for name in staged.trained()} == {"connector.out"}
    assert staged.rates == {"connector.out": 1e-3}
    with pytest.raises(UserError, match=r"train: connector.norm leads to no weight that can train, since the connect"):
        StagedModel(with_queries()).enter(stage(config, train={"connector.norm": 1e-3}))

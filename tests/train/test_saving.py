"""Every connector with every adapter: saved, loaded, resumed and exported.

All pairs take minutes: the fast tests have each connector with one adapter (they take turns) and each adapter with
``mlp``, the slow ones the rest.
"""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tests import tiny
from tests.adapter.test_kinds import LM_LOSS, MERGE, SAMPLES, configured
from tests.test_conf import composed
from tests.tiny import CONF, choices, clip, collator, dinov2, picture, qwen2, seen, siglip, two_towers, worst
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM

from vlmlab.adapter.base import load_adapter
from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.contracts.tensors import Batch
from vlmlab.encoder.preprocess import read_preprocess
from vlmlab.engine.restore import load_trained
from vlmlab.engine.stage import StageModule
from vlmlab.engine.weights import StagedModel
from vlmlab.export import export, export_model
from vlmlab.model.build import build_model
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import Stage
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.resume import content_of, load_last, save_last
from vlmlab.train.run import train

CONNECTORS = [path.stem for path in choices("connector")]
ADAPTERS = [path.stem for path in choices("adapter")]
TURNS = {(connector, ADAPTERS[i % len(ADAPTERS)]) for i, connector in enumerate(CONNECTORS)}
FAST = TURNS | {("mlp", adapter) for adapter in ADAPTERS}
PAIRS = [
    pytest.param(*pair, "concat", id="-".join(pair), marks=[] if pair in FAST else pytest.mark.slow)
    for pair in itertools.product(CONNECTORS, ADAPTERS)
] + [
    pytest.param("mlp", "none" if name != "lavi" else "lora", name, id=name)
    for name in (path.stem for path in choices("fusion"))
    if name not in ("concat", "none")
]
SIGLIP = {"_target_": "vlmlab.encoder.hf.HfEncoder", "layers": [-2]}


@cache
def chosen_fusion(name: str) -> DictConfig:
    """As Hydra composes it, its memory mask filled in."""
    node: DictConfig = composed(f"fusion={name}").fusion
    return node


def composition(connector: str = "mlp", encoder: dict[str, Any] | None = None, fusion: str = "concat") -> DictConfig:
    """Tiny towers of transformers around a connector and a fusion as they ship."""
    return OmegaConf.create(
        {
            "encoder": encoder or SIGLIP | {"path": str(siglip())},
            "connector": OmegaConf.load(CONF / "connector" / f"{connector}.yaml"),
            "lm": {"_target_": "vlmlab.lm.hf.HfLanguageModel", "path": str(qwen2())},
            "mask": OmegaConf.load(CONF / "mask" / "bidir.yaml"),
            "fusion": chosen_fusion(fusion),
        }
    )


def stage_of(adapter: str) -> Stage:
    """A stage that trains everything, the towers by their adapter where there is one."""
    path = CONF / "adapter" / f"{adapter}.yaml"
    config = OmegaConf.to_container(tiny.loaded(path)) if adapter == "none" else configured(path)
    rates = dict.fromkeys(("encoder", "connector", "fusion", "lm"), 1e-2)
    return Stage(
        index=0, name="s", module="x.X", train=rates, data="d", objective=LM_LOSS, steps=3, batch_size=1,
        adapter=config,
    )  # fmt: skip


def fresh(cfg: DictConfig, stage: Stage, seed: int) -> tuple[StagedModel, Optimizer]:
    """What another process would build: new parts and adapters begin otherwise."""
    torch.manual_seed(seed)
    staged = StagedModel(build_model(cfg))
    staged.enter(stage)
    module = StageModule(staged.model, stage, staged.objectives, staged.rates)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = staged.rates[group["part"]]
    return staged, optimizer


def step(staged: StagedModel, optimizer: Optimizer, batch: Batch, number: int) -> None:
    torch.manual_seed(number)  # dropout; the trainer keeps the random states (test_resume)
    outputs = staged.model(batch)
    F.cross_entropy(outputs.logits, outputs.targets).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def logits(model: VLM, batch: Batch) -> Tensor:
    """Without dropout; the modes stay those of the stage."""
    modes = {module: module.training for module in model.modules()}
    found = model.eval()(batch).logits
    for module, training in modes.items():
        module.training = training
    return found


@pytest.mark.parametrize(("connector", "adapter", "fusion"), PAIRS)
def test_saved_loaded_resumed_and_exported(connector: str, adapter: str, fusion: str, tmp_path: Path) -> None:
    cfg = composition(connector, SIGLIP | {"path": str(siglip() if fusion == "concat" else two_towers())}, fusion)
    stage = stage_of(adapter)
    first, optimizer = fresh(cfg, stage, seed=1)
    batch = collator(first.model, pack_length=90)(SAMPLES)
    for number in range(2):
        step(first, optimizer, batch, number)
    first.save(tmp_path / "model.safetensors", stage, cfg)
    save_last(tmp_path / "last.ckpt", content_of(stage, 2, first, optimizer, {}, [], seen(first), set(), 0.0, True))
    after_two = logits(first.model, batch)

    second, other = fresh(cfg, stage, seed=2)
    assert worst(logits(second.model, batch), after_two) > 1e-3
    second.load(tmp_path / "model.safetensors")
    assert torch.equal(logits(second.model, batch), after_two)

    with torch.no_grad():
        for tensor in second.trained().values():
            tensor.add_(0.1)
    saved = load_last(tmp_path / "last.ckpt", stage, second)
    assert saved is not None and torch.equal(logits(second.model, batch), after_two)
    other.load_state_dict(saved["optimizer"])
    for staged, one in ((first, optimizer), (second, other)):
        step(staged, one, batch, 2)
    ends = second.kept()
    assert [name for name, tensor in first.kept().items() if not torch.equal(tensor, ends[name])] == []
    trained = logits(first.model, batch)
    assert worst(trained, after_two) > 1e-4

    assert not any(name.startswith("text.") for name in ends), "the text tower is another's, and stays there"
    if first.model.text is not None:  # the exported vision tower stands alone
        return
    _exported_equals(first.model, cfg, stage, batch, trained, tmp_path / "out")
    assert (tmp_path / "out" / "adapter.safetensors").exists() == (adapter not in MERGE | {"none"})


def _exported_equals(model: VLM, cfg: DictConfig, stage: Stage, batch: Batch, want: Tensor, folder: Path) -> None:
    """What ``encoder=hf lm=hf`` load from the folders answers as the trained model did."""
    export_model(model, cfg, folder)
    moved = copy.deepcopy(cfg)
    moved.lm.path, moved.encoder.path = str(folder / "lm"), str(folder / "encoder")
    again = build_model(moved)
    if again.connector.state_dict():
        again.connector.load_state_dict(load_file(folder / "connector.safetensors"))
    if again.fusion.state_dict():
        again.fusion.load_state_dict(load_file(folder / "fusion.safetensors"))
    if (folder / "adapter.safetensors").exists():
        assert worst(logits(again, plain_batch(again)), logits(model, plain_batch(model))) == 0
        load_adapter(again, instantiate(stage.adapter), folder / "adapter.safetensors")
    assert worst(logits(again, batch), want) < 1e-5 * max(1, float(want.abs().max()))


def plain_batch(model: VLM) -> Batch:
    return collator(model)(SAMPLES[:1])


def test_a_step_without_the_saved_moments_ends_elsewhere(tmp_path: Path) -> None:
    """The comparison above can fail."""
    cfg, stage = composition(), stage_of("lora")
    ends = []
    for keeps in (True, False):
        staged, optimizer = fresh(cfg, stage, seed=1)
        batch = collator(staged.model)(SAMPLES)
        for number in range(3):
            if number == 2 and not keeps:
                optimizer.state.clear()
            step(staged, optimizer, batch, number)
        ends.append(staged.kept())
    assert any(not torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


# -- the towers as transformers sees them ------------------------------------------------------------------------------

PATCH = {"_target_": "vlmlab.encoder.patch.PatchEncoder", "features": 32}
TOWERS = {"siglip": siglip, "clip": clip, "dinov2": dinov2}


@pytest.mark.parametrize("layers", [[-2], None], ids=["tapped", "final"])
@pytest.mark.parametrize("family", TOWERS)
@torch.no_grad()
def test_an_exported_encoder_is_whole(family: str, layers: list[int] | None, tmp_path: Path) -> None:
    """Cut for its features, it is saved with all its layers, so that the same keys load it again."""
    cfg = composition(encoder=SIGLIP | {"layers": layers, "path": str(TOWERS[family]())})
    model = build_model(cfg).eval()
    for parameter in model.encoder.parameters():
        parameter.add_(0.01)
    pixels = torch.from_numpy(model.encoder.preprocess(picture(1, (90, 70))))[None]
    want = model.encoder(pixels).grids[0]
    folder = export_model(model, cfg, tmp_path / "out")["encoder"]
    again = instantiate(cfg.encoder, path=str(folder)).eval()
    assert torch.equal(again(pixels).grids[0], want) and read_preprocess(folder) == model.encoder.preprocess
    tower, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and tower.config.num_hidden_layers == 3
    assert type(AutoImageProcessor.from_pretrained(folder, use_fast=False)).__name__.startswith(
        json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    )


@torch.no_grad()
def test_several_encoders_are_several_folders(tmp_path: Path) -> None:
    nodes = [SIGLIP | {"path": str(clip()), "layers": [1, -1]}, PATCH]
    cfg = composition(encoder={"_target_": "vlmlab.encoder.multi.MultiEncoder", "encoders": nodes})
    model = build_model(cfg)
    folder = export_model(model, cfg, tmp_path / "out")["encoder"]
    first = instantiate(OmegaConf.create(nodes[0]), path=str(folder / "0"))
    pixels = torch.from_numpy(model.encoder.preprocess(picture(1)))[None]
    seen = model.encoder(pixels).grids[:2]
    assert len(seen) == 2 and all(torch.equal(*grids) for grids in zip(first(pixels).grids, seen, strict=True))
    assert set(load_file(folder / "1" / "model.safetensors")) == {"tower.0.weight", "tower.0.bias"}


# -- a run -------------------------------------------------------------------------------------------------------------

TINY = (
    "recipe=joint", "recipe.stages.joint.data=short", "recipe.stages.joint.batch_size=4", "encoder=hf", "lm=hf",
    "+recipe.stages.joint.train.encoder=1e-3", "adapter=lora", "adapter.parts=[lm,encoder]", "budget.max_steps=1",
    "precision=fp32", "trainer.progress=false", "trainer.accelerator=cpu", "collate.pack_length=null",
)  # fmt: skip


def test_a_run_is_exported(tmp_path: Path) -> None:
    cfg = composed(*TINY, f"encoder.path={siglip()}", f"lm.path={qwen2()}")
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(UserError, match="not a run folder"):
        export(run, out)
    with RunFolder(run) as folder:
        folder.open(plain(cfg))
        with pytest.raises(CheckpointError, match="not finished"):
            export(run, out)
        train(cfg, run, lambda model, cfg, folder: {"benchmark/score": 1.0})
    written = export(run, out, form="parts")
    assert set(written) == {"lm", "encoder", "connector"} and all(path.exists() for path in written.values())
    model = load_trained(cfg, run)
    batch = collator(model)(SAMPLES)
    want = logits(model, batch)
    _, info = AutoModelForCausalLM.from_pretrained(out / "lm", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = OmegaConf.load(out / "config.yaml")
    assert saved == OmegaConf.create(plain(cfg))
    saved.lm.path, saved.encoder.path = str(out / "lm"), str(out / "encoder")
    again = build_model(saved)
    again.connector.load_state_dict(load_file(written["connector"]))
    assert worst(logits(again, batch), want) < 1e-5 * max(1, float(want.abs().max()))
    with pytest.raises(UserError, match="has files in it"):
        export(run, out)

"""A recipe of two towers and then a VLM: the encoder goes on; a stage mixed with what it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tests.test_conf import composed

from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.engine.begin import take_encoder
from vlmlab.engine.restore import load_trained
from vlmlab.engine.weights import StagedModel
from vlmlab.model.vlm import VLM
from vlmlab.recipe.stage import parse
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train

TINY = (
    "encoder.num_hidden_layers=1",
    "encoder.hidden_size=16",
    "encoder.intermediate_size=16",
    "text_tower.num_hidden_layers=1",
    "text_tower.hidden_size=16",
    "text_tower.intermediate_size=16",
    "text_tower.projection_size=16",
    "text_tower.tokenizer_samples=20",
    "recipe.stages.contrast.batch_size=4",
    "recipe.stages.contrast.optimizer=adamw",
    "evaluation.lookup_samples=null",
    "budget.max_steps=1",
)
SHORT = ("recipe.stages.align.batch_size=2", "recipe.stages.instruct.batch_size=2")


def trained(folder: Path, *overrides: str) -> Any:
    cfg = composed(*TINY, *overrides)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    (folder / "env.json").write_text(json.dumps({}))
    train(cfg, folder, lambda *_: {"x/y": 1.0})
    return cfg


def encoder_of(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "stages" / stage / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("run") / "outputs" / "r"
    return trained(folder, "recipe=contrastive_then_vlm", *SHORT), folder


def test_the_encoder_of_the_pair_is_that_of_the_vlm(run: tuple[Any, Path]) -> None:
    cfg, folder = run
    towers, align, last = (encoder_of(folder, s) for s in ("0_contrast", "1_align", "2_instruct"))
    torch.manual_seed(int(cfg.seed))
    assert align.keys() < towers.keys() and align.keys() == last.keys()
    assert {name.split(".")[2] for name in towers.keys() - align.keys()} == {
        "head"
    }  # which pools, and the VLM cuts off
    assert all(torch.equal(align[name], towers[name]) and torch.equal(last[name], towers[name]) for name in align)
    loaded = load_trained(cfg, folder)
    assert isinstance(loaded, VLM)
    assert all(torch.equal(loaded.state_dict()[name], towers[name]) for name in align)
    from vlmlab.model.build import build_model

    fresh = build_model(cfg).state_dict()
    assert any(not torch.equal(fresh[name], towers[name]) for name in align)


def test_a_run_that_goes_on_takes_it_again(tmp_path: Path) -> None:
    again = tmp_path / "outputs" / "r"
    trained(again, "recipe=contrastive_then_vlm", *SHORT, "recipe.stages.instruct.steps=0")
    before = load_file(again / "stages" / "1_align" / "model.safetensors")
    for stage in ("1_align", "2_instruct"):
        (again / "stages" / stage / "model.safetensors").unlink()
    (again / "result.json").unlink()
    train(
        composed(*TINY, "recipe=contrastive_then_vlm", *SHORT, "recipe.stages.instruct.steps=0"), again, lambda *_: {}
    )
    after = load_file(again / "stages" / "1_align" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert RunFolder(again).result() is not None


def test_an_encoder_that_does_not_fit_is_refused(run: tuple[Any, Path]) -> None:
    cfg, folder = run
    from vlmlab.model.build import build_model

    other = cfg.copy()
    other.encoder.hidden_size = 8
    stage = parse(cfg)[1]
    with pytest.raises(CheckpointError, match=r"align\.encoder_from=contrast: its encoder has no encoder\."):
        take_encoder(StagedModel(build_model(other)), folder / "stages" / "0_contrast" / "model.safetensors", stage)
    with pytest.raises(UserError, match=r"align\.encoder_from=instruct is not a stage before it \(contrast\)"):
        parse(composed("recipe=contrastive_then_vlm", "recipe.stages.align.encoder_from=instruct"))


def test_a_stage_mixed_with_its_start(tmp_path: Path) -> None:
    """WiSE-FT: share x trained + (1 - share) x the weights at the start; at 1 the trained ones, at 0 the start."""
    found = {}
    for share in (0.0, 0.25, 1.0):
        folder = tmp_path / str(share) / "outputs" / "r"
        mix = f"+recipe.stages.contrast.mix={{run: null, share: {share}}}"
        trained(folder, "recipe=contrastive", mix)
        found[share] = load_file(folder / "stages" / "0_contrast" / "model.safetensors")
    moved = [name for name in found[0.0] if not torch.equal(found[0.0][name], found[1.0][name])]
    assert len(moved) > 20
    for name, start in found[0.0].items():
        want = 0.25 * found[1.0][name].double() + 0.75 * start.double()
        torch.testing.assert_close(found[0.25][name].double(), want, atol=1e-7, rtol=1e-7)

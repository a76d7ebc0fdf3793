"""A step that finds no memory ends with one sentence, and keeps what the steps before it have learnt."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import fake_lab
import pytest
import torch
import tower_lab
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from vlmlab.cli.train import _train
from vlmlab.contracts.errors import OutOfMemory, UserError
from vlmlab.plan.devices import DEVICES
from vlmlab.plan.plan import Settings, plan
from vlmlab.plan.remedies import remedies
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder


def hungry(*overrides: str, kind: str = "cuda", **stage: Any) -> DictConfig:
    cfg = tower_lab.config(*overrides, steps=6, **stage)
    cfg.data.train.instruct.images = 1
    cfg.connector = {"_target_": "tower_lab.Hungry", "kind": kind}
    return cfg


def ended(cfg: DictConfig, folder: Path) -> str:
    """What the train command says."""
    with RunFolder(folder) as opened:
        opened.open(plain(cfg))
        with pytest.raises(UserError) as found:
            _train(cfg, folder)
    return str(found.value)


@pytest.mark.parametrize("kind", tower_lab.NO_ROOM)
def test_every_way_to_say_it(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OutOfMemory, match="stage joint, step 3: out of memory in a micro-batch of 4 samples") as found:
        fake_lab.run(hungry(kind=kind), tmp_path)
    assert isinstance(found.value.__cause__, tower_lab.NO_ROOM[kind][0])
    again = pickle.loads(pickle.dumps(found.value))
    assert (str(again), again.__dict__) == (str(found.value), found.value.__dict__)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    tower_lab.NO_ROOM["shape"] = RuntimeError, "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fake_lab.run(hungry(kind="shape"), tmp_path)
    del tower_lab.NO_ROOM["shape"]


def test_the_sentence_names_what_helps_and_by_how_much(tmp_path: Path) -> None:
    cfg = hungry("trainer.devices=1", accumulate=1)
    said = ended(cfg, tmp_path)
    found = re.match(r"stage joint, step 3: .* of 4 samples, the longest row of (\d+) tokens; by the plan", said)
    assert found and 20 < int(found[1]) < 80, said
    peaks = {key: float(gb) for key, gb in re.findall(r"(\S+=\S+): ([\d.e-]+) GB", said)}
    accumulate = "recipe.stages.joint.accumulate="
    assert list(peaks) == [f"{accumulate}2", f"{accumulate}4", "lm.gradient_checkpointing=true"]
    assert said.endswith(" GB; and 1 more") and len(said) <= 300
    now = float(re.search(r"it needs about ([\d.e-]+) GB", said)[1])  # type: ignore[index]
    assert 0 < peaks[f"{accumulate}4"] < peaks[f"{accumulate}2"] < now
    assert all(0 < peak < now for peak in peaks.values())


def test_the_numbers_are_those_of_the_plan() -> None:
    cfg = tower_lab.config(accumulate=2)
    error = OutOfMemory("joint", 3, samples=2, length=40, asked=12, answered=12)
    said = remedies(cfg, error)
    for key, value in (("lm.gradient_checkpointing", True), ("recipe.stages.joint.accumulate", 4)):
        OmegaConf.update(changed := cfg.copy(), key, value)
        [stage] = plan(changed, Settings(DEVICES["a100"], lengths={"joint": [12, 12]}))
        assert re.search(rf"{key}={str(value).lower()}[^;]*: {stage.peak / 1e9:.3g} GB", said), said


def test_several_devices_may_share_the_weights() -> None:
    cfg = tower_lab.config("trainer.devices=2", accumulate=2)
    del cfg.lm.gradient_checkpointing, cfg.encoder.gradient_checkpointing
    said = remedies(cfg, OutOfMemory("joint", 1))
    assert re.fullmatch(r"by the plan it needs about \S+ GB, and less with trainer.strategy=fsdp2: \S+ GB", said), said


def test_what_was_learnt_is_kept_and_gone_on_from(tmp_path: Path) -> None:
    """Every process gets two steps further; bit for bit what it would be with memory enough."""
    adapter = ("adapter=lora", "adapter.dropout=0.3")
    cfg, kept = hungry(*adapter), []
    cfg.recipe.stages.joint.steps = 5
    calm = cfg.copy()
    calm.connector = {"_target_": "vlmlab.connector.mlp.MlpConnector", "depth": 2}
    fake_lab.run(calm, tmp_path / "whole")
    cfg.trainer.save_every_s = 1000
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            fake_lab.run(cfg, tmp_path / "cut")
        kept.append(torch.load(tmp_path / "cut" / "stages" / "0_joint" / "last.ckpt", weights_only=True)["step"])
    assert kept == [2, 4]  # and a call each for the fifth step and for counting FLOPs
    fake_lab.run(cfg, tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "stages" / "0_joint" / "model.safetensors") for name in ("whole", "cut"))
    assert [name for name, tensor in whole.items() if not torch.equal(cut[name], tensor)] == []

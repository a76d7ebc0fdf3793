"""Two ranks with shards of the towers' weights learn what one process learns, and leave what it leaves."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import fake_lab
import pytest
import torch
import tower_lab
from omegaconf import DictConfig
from processes import run_ranks
from safetensors.torch import load_file
from tests import tiny
from torch import Tensor

from vlmlab.data.sampler import Order
from vlmlab.engine.shards import replicated, units
from vlmlab.fusion.gated_xattn import GatedCrossAttention
from vlmlab.mask.memory.latest import LatestImage
from vlmlab.runs.folder import RunFolder

FSDP2 = "trainer.strategy=fsdp2"
SLOWLY = {"encoder": 5e-5, "connector": 5e-5, "lm": 5e-5}
"""Adam makes a step of its rate from any gradient, also where it is nothing but rounding."""

NOISE = "k_proj.bias"
"""Softmax does not see it: its gradient is zero but for rounding."""


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "stages" / "0_joint" / "model.safetensors")


def one(cfg: DictConfig, folder: Path) -> dict[str, Tensor]:
    fake_lab.run(cfg, folder)
    return weights(folder)


def two(cfg: DictConfig, folder: Path) -> dict[str, Tensor]:
    assert run_ranks(cfg, folder) == [0, 0]
    return weights(folder)


def logged(folder: Path) -> list[dict[str, float]]:
    rows = [row for row in RunFolder(folder).metrics() if "loss" in row]
    return [{key: row[key] for key in ("loss", "gradient_norm", "tokens")} for row in rows]


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "everything": ((), {"train": SLOWLY}),
    "accumulate": (("lm.gradient_checkpointing=true",), {"train": SLOWLY, "accumulate": 2}),
    "frozen lm": ((), {"train": {"connector": 5e-5}, "accumulate": 2}),
    "some layers": ((), {"train": {"connector": 5e-5, "lm": 5e-5}, "layers": {"lm": [-2, -1]}, "accumulate": 2}),
    "muon": ((), {"train": SLOWLY, "optimizer": "muon"}),
    "adapters": (("adapter=lora", "adapter.parts=[lm,encoder]"), {"train": SLOWLY, "accumulate": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_shards_equal_one_process(tmp_path: Path, case: str) -> None:
    overrides, stage = CASES[case]
    whole = one(tower_lab.config(*overrides, **stage), tmp_path / "one")
    cut = two(tower_lab.config(*overrides, FSDP2, **stage), tmp_path / "two")
    assert cut.keys() == whole.keys()
    for name, tensor in whole.items():
        if NOISE not in name:
            torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
    start = tiny.vlm().state_dict()
    assert any((whole[name] - start[name]).abs().max() > 1e-4 for name in whole if name in start)
    assert logged(tmp_path / "two") == [pytest.approx(row, rel=1e-4) for row in logged(tmp_path / "one")]


def test_a_rank_without_an_image_goes_along(tmp_path: Path) -> None:
    """One rank never has an image, and a whole step has none: nothing hangs, and what no image reached stays."""
    stage = {"train": SLOWLY, "accumulate": 2}

    def rare(*overrides: str) -> DictConfig:
        cfg = tower_lab.config(*overrides, **stage)
        cfg.data.train.instruct.images = 9
        return cfg

    order = Order(40, 4, 0, "joint")
    seen = [[sum(k % 9 == 0 for part in order.share(step, rank, 2, 2) for k in part) for rank in (0, 1)]
            for step in range(3)]  # fmt: skip
    assert seen == [[1, 0], [0, 0], [1, 0]]
    whole, cut = one(rare(), tmp_path / "one"), two(rare(FSDP2), tmp_path / "two")
    for name, tensor in whole.items():
        if NOISE not in name:
            torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=0)


SETTINGS = {"flamingo", "idefics", "mllama", "nvlm_x"}  # of gated_xattn
WEIGHTLESS = {"none", "concat", "composite"}
INSIDE = sorted({path.stem for path in tiny.choices("fusion")} - SETTINGS - WEIGHTLESS - {"several", "gated_xattn"})


@pytest.mark.parametrize(
    ("fusion", "strategy"),
    [
        ("gated_xattn", FSDP2),
        ("lavi", "trainer.strategy=auto"),
        *(pytest.param(name, FSDP2, marks=pytest.mark.slow) for name in INSIDE),
    ],
)
def test_blocks_inside_the_layers_learn_the_same_on_two_ranks(tmp_path: Path, fusion: str, strategy: str) -> None:
    """Cut into shards too; and where one rank has no image in a step, its blocks take part with nothing seen."""
    stage = {"train": {**SLOWLY, "fusion": 5e-5}, "accumulate": 2}
    towers = (f"fusion={fusion}", f"encoder.path={tiny.two_towers()}")

    def rare(*overrides: str) -> DictConfig:
        cfg = tower_lab.config(*towers, *overrides, **stage)
        cfg.data.train.instruct.images = 9
        return cfg

    whole, cut = one(rare(), tmp_path / "one"), two(rare(strategy), tmp_path / "two")
    assert cut.keys() == whole.keys() and any(name.startswith("fusion.") for name in cut)
    assert not any(name.startswith("text.") for name in cut), "the text tower is loaded, not learnt"
    for name, tensor in whole.items():
        if NOISE not in name:  # weights move by 1e-4; of a router, whose gradient is small, 3.5e-6 was measured
            torch.testing.assert_close(cut[name], tensor, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
    # the norms too: Adam would hide a gradient that is off by a factor
    assert logged(tmp_path / "two") == [pytest.approx(row, rel=1e-4) for row in logged(tmp_path / "one")]


def test_a_block_at_a_port_is_no_longer_whole_on_every_rank() -> None:
    model = tiny.vlm(fusion=GatedCrossAttention(LatestImage(), every=2, heads=2, head_width=6))
    alone = {id(p) for p in replicated(model)}
    inside = {id(p) for p in model.fusion.blocks.parameters()}
    assert not alone & inside and {id(p) for p in model.connector.parameters()} <= alone
    assert [unit for unit in units(model) if unit in set(model.fusion.modules())] == list(model.fusion.blocks)


def test_a_blank_image_counts_nothing() -> None:
    model = tiny.vlm()
    batch = tiny.collator(model)([tiny.TEXT_ONLY])
    together = model(batch, in_step=True)
    assert torch.equal(together.logits, model(batch).logits)
    together.logits.sum().backward()
    gradients = {name: p.grad for name, p in model.encoder.named_parameters() if p.grad is not None}
    assert gradients and all(not gradient.any() for gradient in gradients.values())
    reached = {name.split(".")[3] for name in gradients if ".layers." in name}
    assert len(reached) == len(model.encoder.tower.encoder.layers)


def test_killed_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    stage = {"accumulate": 2}
    whole = two(tower_lab.config(FSDP2, **stage), tmp_path / "whole")
    cfg = tower_lab.config(FSDP2, **stage)
    assert run_ranks(cfg, tmp_path / "cut", die_in=2) == [-signal.SIGKILL] * 2
    saved = torch.load(tmp_path / "cut" / "stages" / "0_joint" / "last.ckpt", weights_only=True)
    assert saved["step"] == 2
    assert {name: tensor.shape for name, tensor in saved["weights"].items()} == {n: t.shape for n, t in whole.items()}
    moments = [state["exp_avg"].shape for state in saved["optimizer"]["state"].values()]
    assert sorted(moments) == sorted(saved["weights"][name].shape for name in saved["names"])
    cut = two(cfg, tmp_path / "cut")
    assert [name for name, tensor in whole.items() if not torch.equal(cut[name], tensor)] == []


def test_bf16_keeps_weights_in_fp32(tmp_path: Path) -> None:
    one(tower_lab.config("precision=bf16", train=SLOWLY), tmp_path / "one")
    cut = two(tower_lab.config("precision=bf16", FSDP2, train=SLOWLY), tmp_path / "two")
    assert {tensor.dtype for tensor in cut.values()} == {torch.float32}
    assert logged(tmp_path / "two") == [pytest.approx(row, rel=0.02) for row in logged(tmp_path / "one")]

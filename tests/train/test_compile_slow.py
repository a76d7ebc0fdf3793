"""Compiled layers learn what the others learn; compiling takes a minute or more, so `slow`."""

from __future__ import annotations

from pathlib import Path

import fake_lab
import pytest
import torch
import tower_lab
from processes import run_ranks
from safetensors.torch import load_file
from tests import tiny

from vlmlab.cli.rules.machine import compiler_at_hand
from vlmlab.engine.restore import load_trained
from vlmlab.runs.folder import RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        compiler_at_hand({"trainer": {"compile": True}}, {}) is not None, reason="no C++ compiler for torch.compile"
    ),
]
STAGE = {"train": {"encoder": 5e-5, "connector": 5e-5, "lm": 5e-5}, "accumulate": 2, "steps": 5}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "stages" / "0_joint" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(folder).metrics() if "loss" in row]


@pytest.mark.parametrize("ranks", [1, 2], ids=["one process", "shards"])
def test_compiled_layers_learn_the_same(tmp_path: Path, ranks: int) -> None:
    """Rows of many lengths, with and without an image, and layers that compute twice."""
    overrides = ["lm.gradient_checkpointing=true", "trainer.compile=true"]
    fake_lab.run(tower_lab.config(overrides[0], **STAGE), tmp_path / "plain")
    if ranks == 1:
        cfg = tower_lab.config(*overrides, **STAGE)
        fake_lab.run(cfg, tmp_path / "compiled")
    else:
        cfg = tower_lab.config(*overrides, "trainer.strategy=fsdp2", **STAGE)
        assert run_ranks(cfg, tmp_path / "compiled", ranks, patience=1200) == [0] * ranks
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=0)
    model = load_trained(cfg, tmp_path / "compiled")
    assert len(model.generate(tiny.collator(model).ask([tiny.ONE_TURN]), 3)) == 1  # type: ignore[operator, arg-type]

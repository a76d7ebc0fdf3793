"""Losses on held-out samples between the steps of a stage, and that they change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tower_lab
from safetensors.torch import load_file
from tests.test_conf import composed

from vlmlab.cli.rules.run import watched
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train


def trained(folder: Path, every: int | None, watched: list[str] | None = None) -> dict[str, torch.Tensor]:
    cfg = tower_lab.config()
    cfg.evaluation.every, cfg.evaluation.held_out_samples, cfg.evaluation.watched = every, 6, watched
    cfg.data.val.instruct = {"_target_": "tower_lab.Mixed", "images": 1}
    cfg.data.val.other = {"_target_": "tower_lab.Mixed", "images": 2}
    with RunFolder(folder) as run:
        run.open({"data": {}})
        train(cfg, folder, lambda *args: {"accuracy": 0.5})
    (weights,) = folder.glob("stages/*/model.safetensors")
    return load_file(weights)


def test_rows_beside_the_training_and_not_a_bit_of_it_changed(tmp_path: Path) -> None:
    watching, alone = trained(tmp_path / "2", 2, ["other", "instruct"]), trained(tmp_path / "None", None)
    assert watching.keys() == alone.keys()
    assert all(torch.equal(watching[name], alone[name]) for name in alone)
    rows = [row for row in RunFolder(tmp_path / "2").metrics() if "held_out/loss" in row]
    assert [(row["stage"], row["step"]) for row in rows] == [("joint", 0), ("joint", 2), ("joint", 3)]
    assert all(row["held_out/loss"] != row["held_out/shuffled_loss"] for row in rows)
    assert rows[-1]["held_out/loss"] < rows[0]["held_out/loss"]
    assert all(row["held_out/instruct/loss"] == row["held_out/loss"] for row in rows), "the same samples"
    assert all(row["held_out/other/loss"] != row["held_out/other/shuffled_loss"] for row in rows)
    assert rows[-1]["held_out/other/loss"] != rows[0]["held_out/other/loss"] != rows[0]["held_out/loss"]
    assert not any("held_out/loss" in row for row in RunFolder(tmp_path / "None").metrics())


def test_what_cannot_be_watched_is_refused() -> None:
    cfg: Any = composed("evaluation.every=5", "evaluation.watched=[short,dense]")
    assert watched(plain(cfg), {}) is None
    cfg.evaluation.watched = ["shrot"]
    assert "evaluation.watched=shrot is not in data.val" in str(watched(plain(cfg), {}))
    cfg.evaluation.watched, cfg.evaluation.every = ["short"], None
    assert "set evaluation.every=<steps>" in str(watched(plain(cfg), {}))


def test_what_shards_cannot_do_is_refused() -> None:
    cfg: Any = composed("evaluation.every=5")
    assert watched(cfg, {}) is None
    cfg.trainer.strategy = "fsdp2"
    assert "evaluation.every" in str(watched(cfg, {}))

"""A training has one run at W&B, whatever becomes of it, and another training has another."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from fake_lab import config

from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.record import wandb_id


def begun(path: Path, **changes: bool) -> str:
    with RunFolder(path) as run:
        run.open(plain(config()), fresh=changes.get("fresh", False))
        return wandb_id(run)


def test_a_resumed_training_has_the_same_run_and_a_new_one_another(tmp_path: Path) -> None:
    first = begun(tmp_path / "r")
    assert begun(tmp_path / "r") == first and len(first) == 16
    new = begun(tmp_path / "r", fresh=True)
    assert new != first
    shutil.rmtree(tmp_path / "r")  # the same path on another machine
    assert begun(tmp_path / "r") not in (first, new)


def test_a_folder_that_has_moved_keeps_its_run(tmp_path: Path) -> None:
    first = begun(tmp_path / "r")
    shutil.move(tmp_path / "r", tmp_path / "elsewhere")
    assert begun(tmp_path / "elsewhere") == first


def test_a_run_that_was_named_after_its_place_goes_on_under_that_name(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as run:
        run.open(plain(config()))
    (tmp_path / "r" / "wandb").mkdir()
    assert begun(tmp_path / "r") == hashlib.sha256(str((tmp_path / "r").resolve()).encode()).hexdigest()[:16]

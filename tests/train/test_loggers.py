"""Loggers beside metrics.jsonl: every row once, whatever becomes of the run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_lab import config, run
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from processes import run_and_die
from tests.test_conf import CONF

from vlmlab.contracts.errors import UserError
from vlmlab.recipe.stage import parse
from vlmlab.runs.folder import RunFolder
from vlmlab.train.loggers import ExtraLoggers, position

STEPS = 11  # of both stages of fake_lab.config


def logged(name: str, **keys: Any) -> dict[str, Any]:
    return OmegaConf.merge(OmegaConf.load(CONF / "logger" / f"{name}.yaml"), keys)  # type: ignore[return-value]


class Told(Logger):
    """Remembers what it is told."""

    rows: ClassVar[list[tuple[Mapping[str, float], int | None]]] = []
    name = version = "told"  # type: ignore[assignment]

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def absent() -> Logger:
    raise ModuleNotFoundError("No module named 'absent'")


def test_a_killed_run_tells_every_row_once_on_one_axis(tmp_path: Path) -> None:
    """Killed a step after the only checkpoint, which it does again."""
    cfg = config(logger=logged("csv"))
    run_and_die(cfg, tmp_path, 4)
    next(tmp_path.glob("stages/*/last.ckpt")).unlink()  # it begins again
    run(cfg, tmp_path)
    files = sorted(tmp_path.glob("csv/version_*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open())]
    losses = [(int(row["step"]), float(row["train/loss"])) for row in rows if row.get("train/loss")]
    assert len(files) == 2 and [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert [loss for _, loss in losses] == [row["loss"] for row in RunFolder(tmp_path).metrics() if "loss" in row]
    assert float(rows[-1]["fake/accuracy"]) == 0.5 and int(rows[-1]["step"]) == STEPS


def test_a_logger_that_comes_late_is_told_what_was_before_and_looks_too(tmp_path: Path) -> None:
    cfg = config(logger={"name": "own", "make": {"_target_": f"{__name__}.Told"}})
    Told.rows.clear()
    folder = RunFolder(tmp_path)
    rows = [
        {"stage": "align", "step": 0, "held_out/loss": 2.0, "slice/a/vqa_accuracy": 0.5},
        {"stage": "align", "step": 6, "loss": 1.0, "lr/connector": 0.1},
        {"stage": "align", "step": 6, "finished": True, "seconds": 1.0},
        {"stage": "tune", "step": 0, "held_out/loss": 1.5},
        {"stage": "tune", "step": 2, "loss": 0.5},
        {"stage": "tune", "step": 2, "held_out/loss": 1.0},
    ]
    ExtraLoggers(cfg, folder, True).log(rows)
    assert [step for _, step in Told.rows] == [0, 6, 6, 8, 8]
    assert Told.rows[0][0] == {"held_out/loss": 2.0, "slice/a/vqa_accuracy": 0.5, "samples": 0.0}
    assert Told.rows[3][0] == {"train/loss": 0.5, "samples": 8.0 * 8}
    ExtraLoggers(cfg, folder, True).log(rows)
    assert len(Told.rows) == 5
    assert ExtraLoggers(cfg, folder, False).loggers == []


def test_steps_and_samples_go_on_over_stages() -> None:
    stages = parse(config())
    assert position(stages, stages[0], 3) == (3, 24) and position(stages, stages[1], 5) == (11, 88)


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config(logger=logged("tensorboard")), tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [(event.step, event.value) for event in read.Scalars("fake/accuracy")] == [(STEPS, 0.5)]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (f"{__name__}.absent", "its package is not installed .*choose another logger"),
        ("lightning.pytorch.loggers.CSVLogger", "save_dir.*correct its keys"),
        ("builtins.dict", "is not a Lightning logger"),
    ],
)
def test_a_logger_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path, target: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(config(logger={"name": "own", "make": {"_target_": target}}), tmp_path)
    assert not list(tmp_path.glob("stages/*"))

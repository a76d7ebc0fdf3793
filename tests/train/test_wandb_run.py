"""A sweep's runs at W&B, read back from what they leave offline; and when a run is told at once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import wandb_records
from fake_lab import FakeSource, config, evaluate
from omegaconf import DictConfig, OmegaConf
from processes import forked
from tests.test_conf import CONF
from torch.optim import Optimizer

from vlmlab.cli.wandb_sweep import log_sweep
from vlmlab.engine.stage import StageModule
from vlmlab.evaluate.metrics.rows import Row, write_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.tracking import Counted, group_of, mode_of, name_of
from vlmlab.train.run import train
from vlmlab.train.signals import Interrupted

QUESTIONS = 3


def lab(seed: int) -> DictConfig:
    logger = OmegaConf.load(CONF / "logger" / "wandb.yaml")
    source = {"_target_": "fake_lab.FakeSource"}
    return config(fake__dropout=0.3, seed=seed, logger=logger, data__benchmarks={"words": {"source": source}})


def cell(folder: Path, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "overrides.json").write_text(json.dumps(overrides))
    return folder


def trained(cfg: DictConfig, folder: Path, fresh: bool = False) -> None:
    with RunFolder(folder) as run:
        run.open(plain(cfg), fresh=fresh)
        samples = [FakeSource()[index] for index in range(QUESTIONS)]
        rows = [Row("words", s.id, 0, "", "what?", "x", ("x",), None, (f"{s.id}#0",)) for s in samples]
        for baseline in ("", "shuffled"):
            write_rows(predictions_file(folder, "words", baseline), rows)
        train(cfg, folder, evaluate)


def stopped(cfg: DictConfig, folder: Path) -> None:
    """Ended by SIGTERM in the fifth step."""
    real, left = StageModule.on_before_optimizer_step, [4]

    def stopping(self: StageModule, optimizer: Optimizer) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        left[0] -= 1
        real(self, optimizer)

    StageModule.on_before_optimizer_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trained(cfg, folder)


def told(sweep: Path) -> None:
    (sweep / "table.csv").write_text("seed,score\n1,0.5\n2,0.25\n")
    log_sweep(sweep, {"project": "vlmlab"})


def finish(*args: Any) -> None:
    process = forked(*args)
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.slow
def test_two_cells_one_stopped_and_resumed_one_made_afresh_are_three_runs_of_one_group(tmp_path: Path) -> None:
    one = cell(tmp_path / "sweep" / "one", "budget=test", "seed=1")
    two = cell(tmp_path / "sweep" / "two", "budget=test", "seed=2")
    finish(stopped, lab(1), one)
    next(one.glob("stages/*/last.ckpt")).unlink()  # steps that it has told are done again
    finish(trained, lab(1), one)
    finish(trained, lab(2), two)
    finish(trained, lab(2), two, True)
    finish(told, tmp_path / "sweep")
    stop, resumed = wandb_records.read(one)
    (first,), (second,) = wandb_records.read(tmp_path / "sweep" / "two.old-1"), wandb_records.read(two)
    parts = [stop, resumed, first, second]
    assert {part["run"].run_group for part in parts} == {"sweep"} and {p["run"].job_type for p in parts} == {"train"}
    assert [part["run"].display_name for part in parts] == ["seed=1", "seed=1", "seed=2", "seed=2"]
    ids = [part["run"].run_id for part in parts]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert [part["exit"] for part in parts] == [143, 0, 0, 0]
    for rows in (stop["rows"] + resumed["rows"], first["rows"], second["rows"]):
        numbers = [row["_step"] for row in rows]
        assert numbers == sorted(set(numbers)), "no two rows of a run have the same number"
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 12))
        assert [row["samples/words/nrows"] for row in rows if "samples/words/nrows" in row] == [QUESTIONS]
    assert second["summary"]["fake/accuracy"] == 0.5 and second["summary"]["cost/trainable"] > 0
    (whole,) = wandb_records.read(tmp_path / "sweep")
    assert whole["run"].run_group == "sweep" and whole["run"].job_type == "sweep" and whole["exit"] == 0
    assert whole["rows"][0]["table/nrows"] == 2
    assert ["table.csv"] in [[entry.path for entry in one.manifest.contents] for one in whole["artifacts"]]
    for part in (resumed, first, second):
        kept = [entry for artifact in part["artifacts"] for entry in artifact.manifest.contents]
        images = [Path(entry.local_path) for entry in kept if entry.path.startswith("media/images/")]
        assert len(images) == 3, "those of two questions, and wrong ones, of which one is the other's"
        assert all(path.is_relative_to(tmp_path / "sweep") for path in images)


def test_a_run_is_told_at_once_where_there_is_a_key_and_never_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "mine"))
    assert [mode_of(asked) for asked in ("auto", "online", "offline")] == ["offline"] * 3
    (tmp_path / "mine").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    assert [mode_of(asked) for asked in ("auto", "online", "offline")] == ["online", "online", "offline"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode_of("online") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mode_of("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode_of("online") == "disabled"


def test_a_cell_is_named_by_what_differs_and_a_run_by_its_folder(tmp_path: Path) -> None:
    one = cell(tmp_path / "s" / "one", "connector=mlp", "budget=test", "seed=1")
    cell(tmp_path / "s" / "two", "connector=qformer", "budget=test", "seed=1")
    assert name_of(one) == "connector=mlp" and group_of(one) == "s"
    alone = cell(tmp_path / "t" / "one", "connector=mlp")
    assert name_of(alone) == "one" and group_of(alone) == "t"
    assert name_of(tmp_path / "t") == "t" and group_of(tmp_path / "t") is None


def test_rows_are_counted_over_processes_and_anew_for_another_run(tmp_path: Path) -> None:
    first = Counted(tmp_path, "a")
    assert [first.next(), first.next(), Counted(tmp_path, "a").next()] == [0, 1, 2]
    assert Counted(tmp_path).id == "a" and Counted(tmp_path, "b").next() == 0

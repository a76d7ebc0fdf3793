"""Stopped anywhere and started again, a run ends with the same bits."""

import os
import signal

import pytest
import torch
from fake_lab import config, run
from processes import run_and_die

from vlmlab.contracts.errors import CheckpointError
from vlmlab.engine.stage import StageModule
from vlmlab.runs.folder import RunFolder
from vlmlab.train.signals import Interrupted

STEPS = 11  # of both stages of fake_lab.config


def end_of(folder):
    """The bytes of every stage's file and the rows of metrics.jsonl, without what depends on the clock."""
    files = {path.parent.name: path.read_bytes() for path in sorted(folder.glob("stages/*/model.safetensors"))}
    timed = {"samples_per_s", "seconds", "peak_bytes"}
    rows = [{k: v for k, v in row.items() if k not in timed} for row in RunFolder(folder).metrics()]
    return files, rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config(fake__dropout=0.3), folder)
    files, rows = end_of(folder)
    assert list(files) == ["0_align", "1_tune"]
    assert len(rows) == STEPS + 2
    return files, rows


def stop_at(monkeypatch, step, number):
    """Send ourselves a signal in the middle of this optimizer step (from 0, over all stages)."""
    real, left = StageModule.on_before_optimizer_step, [step]

    def stopping(self, optimizer):
        if left[0] == 0:
            os.kill(os.getpid(), number)
        left[0] -= 1
        real(self, optimizer)

    monkeypatch.setattr(StageModule, "on_before_optimizer_step", stopping)


@pytest.mark.parametrize(
    ("step", "number", "workers"),
    [
        (0, signal.SIGTERM, 0),
        (2, signal.SIGINT, 2),
        (5, signal.SIGTERM, 0),
        (6, signal.SIGINT, 0),
        (8, signal.SIGTERM, 2),
    ],
)
def test_a_signal_saves_and_loses_nothing(tmp_path, monkeypatch, uninterrupted, step, number, workers):
    cfg = config(fake__dropout=0.3, trainer__save_every_s=1000, trainer__workers=workers)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(Interrupted) as caught:
            run(cfg, tmp_path)
    assert caught.value.code == 128 + number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = RunFolder(tmp_path).state()
    if step != 5:  # the last step of a stage is followed by the stage's own file
        saved = torch.load(next(tmp_path.glob("stages/*/last.ckpt")), weights_only=True)
        assert saved["step"] == state["step"] == (step if step < 6 else step - 6) + 1
    run(cfg, tmp_path)
    assert end_of(tmp_path) == uninterrupted
    assert not list(tmp_path.glob("stages/*/last.ckpt"))


def test_stages_that_train_paths_inside_parts_go_on_too(tmp_path, monkeypatch):
    paths = {"lm": 1e-3, "lm.mix": None, "lm.head": 1e-2, "connector.bias": 1e-3}
    cfg = config(recipe__stages__align__train={"connector": {"weight": 1e-2}}, recipe__stages__tune__train=paths)
    run(cfg, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 8, signal.SIGTERM)
        with pytest.raises(Interrupted):
            run(cfg, tmp_path / "stopped")
    run(cfg, tmp_path / "stopped")
    assert end_of(tmp_path / "stopped") == end_of(tmp_path / "whole")


@pytest.mark.parametrize(("step", "workers"), [(4, 2), (9, 0)])
def test_a_killed_run_replays(tmp_path, uninterrupted, step, workers):
    cfg = config(fake__dropout=0.3, trainer__workers=workers)
    run_and_die(cfg, tmp_path, step)
    run(cfg, tmp_path)
    assert end_of(tmp_path) == uninterrupted


def test_a_run_killed_between_checkpoints_replays_from_the_last(tmp_path, uninterrupted):
    cfg = config(fake__dropout=0.3, trainer__save_every_s=1000)
    run_and_die(cfg, tmp_path, 4)
    assert not list(tmp_path.glob("stages/*/last.ckpt"))
    run(cfg, tmp_path)
    assert end_of(tmp_path) == uninterrupted


def test_killed_again_and_again(tmp_path, uninterrupted):
    cfg = config(fake__dropout=0.3)
    for _ in range(4):
        run_and_die(cfg, tmp_path, 2)
    run(cfg, tmp_path)
    assert end_of(tmp_path) == uninterrupted


def test_the_order_of_workers_changes_nothing(tmp_path, uninterrupted):
    run(config(fake__dropout=0.3, trainer__workers=2), tmp_path)
    assert end_of(tmp_path) == uninterrupted


def test_another_seed_ends_elsewhere(tmp_path, uninterrupted):
    run(config(fake__dropout=0.3, seed=4), tmp_path)
    assert end_of(tmp_path)[0]["0_align"] != uninterrupted[0]["0_align"]


def test_an_adapter_of_a_later_stage_resumes(tmp_path):
    changes = {"fake__dropout": 0.3, "recipe__stages__tune__adapter": {"_target_": "fake_lab.FakeAdapter", "lr": 0.02}}
    run(config(**changes), tmp_path / "whole")
    for folder, step in ((tmp_path / "a", 6), (tmp_path / "b", 9)):  # before its first checkpoint, and after
        run_and_die(config(**changes), folder, step)
        run(config(**changes), folder)
        assert end_of(folder) == end_of(tmp_path / "whole")
    row = RunFolder(tmp_path / "whole").metrics()[-2]
    assert row["lr/connector"] / row["lr/lm"] == pytest.approx(20)  # the adapter's own rate against the stage's


def test_last_ckpt_of_changed_towers_is_refused(tmp_path):
    run_and_die(config(), tmp_path, 3)
    path = tmp_path / "stages" / "0_align" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["before"]["encoder.0.weight"] = "0" * 32
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="other frozen weights"):
        run(config(), tmp_path)


@pytest.mark.parametrize("damage", ["torn", "weights", "stage"])
def test_a_damaged_last_ckpt_is_refused(tmp_path, damage):
    run_and_die(config(), tmp_path, 3)
    path = tmp_path / "stages" / "0_align" / "last.ckpt"
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        saved = torch.load(path, weights_only=True)
        if damage == "weights":
            saved["weights"].pop("connector.bias")
        else:
            saved["stage"] = "other"
        torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        run(config(), tmp_path)

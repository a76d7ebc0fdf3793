"""A disk that takes no more: one sentence, a state that says so, nothing lost, and the same bits once there is room."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_lab
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from vlmlab.cli import train as command
from vlmlab.cli.entry import said
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train


@pytest.fixture(autouse=True)
def _fake_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_train", lambda cfg, folder: train(cfg, folder, fake_lab.evaluate))
    monkeypatch.setattr(command, "check_same", lambda run, cfg: None)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def go(cfg: DictConfig, folder: Path) -> None:
    with RunFolder(folder) as run:
        run.open(plain(cfg))
        command.train_in(run, cfg)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fake_lab.run(fake_lab.config(), folder)
    return folder


@pytest.mark.parametrize(
    ("size", "every", "file", "step"),
    [
        (9_000, 0, "stages/0_align/last.ckpt", 1),
        (2_000, 1000, "metrics.jsonl", 2),
        (4_000, 1000, "stages/1_tune/model.safetensors", 5),
    ],
    ids=["checkpoint", "metrics", "weights"],
)
def test_after_there_is_room_it_ends_with_the_same_bits(
    tmp_path: Path, whole: Path, size: int, every: float, file: str, step: int
) -> None:
    cfg = fake_lab.config(trainer__save_every_s=every)
    with no_file_beyond(size), pytest.raises(Exception, match=r"[Ff]ile too large") as found:
        go(cfg, tmp_path / "run")
    assert isinstance(found.value, Exception)
    sentence = said(found.value)
    assert sentence == (
        f"{tmp_path / 'run' / file}: file too large; raise the largest size of a file (ulimit -f), then give the same "
        "command again"
    )
    state = RunFolder(tmp_path / "run").state()
    assert (state["state"], state["step"], state["error"]) == ("failed", step, sentence)
    assert not [*(tmp_path / "run").rglob(".*")], "what was half written is removed"
    go(cfg, tmp_path / "run")
    for path in whole.glob("stages/*/model.safetensors"):
        again = load_file(tmp_path / "run" / path.relative_to(whole))
        assert all(torch.equal(again[name], tensor) for name, tensor in load_file(path).items())

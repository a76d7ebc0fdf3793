"""The user's callbacks: they see a training and change nothing of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from fake_lab import config, run
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume import end_of

from vlmlab.contracts.errors import UserError
from vlmlab.runs.config import config_hash, plain


class Drawing(L.Callback):
    """Draws random numbers wherever it can, and counts."""

    calls: ClassVar[list[str]] = []

    def __init__(self, words: str = "a") -> None:
        self.words = words

    def draw(self, *args: Any) -> None:
        self.calls.append(self.words)
        torch.rand(3), np.random.rand(), random.random()

    on_train_start = on_train_batch_start = on_after_backward = on_train_batch_end = on_train_end = draw
    on_before_optimizer_step = draw


class Meddling(L.Callback):
    """Changes what it is told to."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weight = next(p for p in module.parameters() if p.grad is not None)
        if self.what == "weights":
            weight.data *= 1.001
        elif self.what == "gradients":
            weight.grad *= 2.0  # type: ignore[operator]
        else:
            trainer.should_stop = True


def test_what_is_learnt_and_its_identity_stay_the_same(tmp_path: Path) -> None:
    alone = config(fake__dropout=0.3)
    run(alone, tmp_path / "alone")
    seen = config(fake__dropout=0.3, callbacks={"one": {"_target_": f"{__name__}.Drawing", "words": "b"}, "off": None})
    run(seen, tmp_path / "seen")
    assert end_of(tmp_path / "seen") == end_of(tmp_path / "alone")
    assert len(Drawing.calls) > 40 and set(Drawing.calls) == {"b"}
    assert config_hash(plain(seen)) == config_hash(plain(alone))


@pytest.mark.parametrize(
    ("what", "said"), [("weights", "weights or gradients"), ("gradients", "weights or grad"), ("stop", "asked to stop")]
)
def test_one_that_changes_something_is_refused(tmp_path: Path, what: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"callbacks\.mine: .*{said}"):
        run(config(callbacks={"mine": {"_target_": f"{__name__}.Meddling", "what": what}}), tmp_path)


@pytest.mark.parametrize(
    ("kind", "said"), [(ModelCheckpoint, "writes checkpoints"), (dict, "not a Lightning callback")]
)
def test_what_is_none_is_refused_before_the_first_step(tmp_path: Path, kind: type, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(config(callbacks={"mine": {"_target_": f"{kind.__module__}.{kind.__qualname__}"}}), tmp_path)
    assert not list(tmp_path.glob("stages/*"))

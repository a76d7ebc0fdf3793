"""Saving and restoring a stage: on time, on a signal, and on every rank together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.optim import Optimizer

from vlmlab.contracts.errors import CheckpointError, OutOfMemory, brief
from vlmlab.engine import rng
from vlmlab.engine.shards import scattered
from vlmlab.engine.stage import StageModule
from vlmlab.engine.stamp import Stamp
from vlmlab.engine.weights import StagedModel
from vlmlab.train.resume import content_of, save_last
from vlmlab.train.signals import Interrupted, Signals

LEAST_SHARE = 10
"""Saving never takes more than about one part in this many of the time."""


class StageCheckpoint(L.Callback):
    """Writes ``last.ckpt`` every `every_s` seconds and on signals; restores optimizer and random states.

    Args:
        path: of ``last.ckpt``.
        staged: the model.
        signals: whether one came.
        before: fingerprints from the beginning of the stage.
        every_s: seconds between checkpoints; 0: after every step.
        seed: the run's seed, which starts the stage's random states.
        saved: what ``load_last`` returned.
        stamp: of the run and the stage.
    """

    def __init__(
        self,
        path: Path,
        staged: StagedModel,
        signals: Signals,
        before: dict[str, str],
        every_s: float,
        seed: int,
        saved: dict[str, Any] | None,
        stamp: Stamp | None = None,
    ) -> None:
        self.path, self.staged, self.signals, self.before = path, staged, signals, before
        self.every_s, self.seed, self.saved, self.stamp = every_s, seed, saved, stamp
        self._earlier = float(saved["seconds"]) if saved else 0.0
        self._began = self._last_save = time.perf_counter()
        self._cost = 0.0
        self._fresh = True
        self._states: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Training time of this stage over all restarts."""
        return self._earlier + time.perf_counter() - self._began

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals wait for the end of a step."""
        self.signals.install()  # again: Lightning took SIGTERM in between
        self.signals.deferred = True
        self._began = self._last_save = time.perf_counter()
        if self.saved:
            with self._reading():
                optimizer = _optimizer(trainer)
                optimizer.load_state_dict(scattered(self.saved["optimizer"], optimizer))
                if self.saved["scaler"]:
                    trainer.precision_plugin.load_state_dict(self.saved["scaler"])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What a checkpoint's states cannot be set to is its fault.

        Raises:
            CheckpointError: whatever torch and numpy say of it.
        """
        try:
            yield
        except Exception as error:
            why = brief(" ".join(f"{type(error).__name__}: {error}".split()), 100)
            raise CheckpointError(f"{self.path} is damaged ({why}); delete it to train that stage again.") from error

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Before the first step of this process: random states as they were, or as the stage begins."""
        assert isinstance(pl_module, StageModule)
        if self._fresh:
            self._fresh = False
            states = self.saved["rng"] if self.saved else []
            if trainer.global_rank < len(states):
                with self._reading():
                    rng.restore(states[trainer.global_rank])
            else:
                rng.seed_all(self.seed, pl_module.stage.name, trainer.global_rank)
        self._states = rng.state()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """After every optimizer step: save when it is time or a signal came; leave after a signal."""
        assert isinstance(pl_module, StageModule)
        if pl_module.done >= pl_module.stage.steps:
            return  # the stage's own file follows
        save, signum = self._agree(trainer, pl_module.device)
        if save or signum:
            self._save(trainer, pl_module, rng.states_of_all_ranks())
        if signum:
            self.signals.deferred = False
            raise Interrupted(signum)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what the steps before one that found no memory have learnt.

        Not where other ranks may be inside that step, nor where it has changed weights or statistics already: the
        checkpoint that is there stays.
        """
        assert isinstance(pl_module, StageModule)
        if not isinstance(exception, OutOfMemory) or exception.moved or not pl_module.done or self._states is None:
            return
        if trainer.world_size == 1 and len(self.staged.live()) == len(self.staged.trained()):
            self._save(trainer, pl_module, [self._states])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Signals act at once again."""
        self.signals.deferred = False

    def _agree(self, trainer: L.Trainer, device: torch.device) -> tuple[bool, int]:
        """Whether to save and which signal came to any rank; the same answer on all."""
        wait = max(self.every_s, LEAST_SHARE * self._cost) if self.every_s else 0.0
        due = trainer.is_global_zero and time.perf_counter() - self._last_save >= wait
        signum = self.signals.caught or 0
        if trainer.world_size > 1:
            both = torch.tensor([int(due), signum], device=device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
            due, signum = bool(both[0]), int(both[1])
        return due, signum

    def _save(self, trainer: L.Trainer, module: StageModule, states: list[dict[str, Any]]) -> None:
        began = time.perf_counter()
        content = content_of(
            module.stage,
            module.done,
            self.staged,
            _optimizer(trainer),
            trainer.precision_plugin.state_dict(),
            states,
            self.before,
            module.pending,
            self.seconds,
            keep=trainer.is_global_zero,
            stamp=self.stamp,
        )
        if trainer.is_global_zero:
            save_last(self.path, content)
        self._last_save = time.perf_counter()
        self._cost = self._last_save - began


def _optimizer(trainer: L.Trainer) -> Optimizer:
    return trainer.strategy.optimizers[0]

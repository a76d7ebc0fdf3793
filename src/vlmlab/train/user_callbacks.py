"""The user's Lightning callbacks: they see everything and change nothing.

A run's identity does not depend on them, so they must not change its result: random states are restored after every
hook in which they act, and weights, gradients and ``trainer.should_stop`` have to be as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig
from torch import Tensor

from vlmlab.contracts.errors import UserError
from vlmlab.engine import rng
from vlmlab.engine.shards import own
from vlmlab.engine.stage import StageModule


def callbacks_of(cfg: DictConfig) -> dict[str, L.Callback]:
    """The callbacks of the group, each made anew, by name.

    Raises:
        UserError: one is not a Lightning callback, or writes checkpoints of its own.
    """
    made: dict[str, L.Callback] = {}
    for name, node in (cfg.get("callbacks") or {}).items():
        if node is None:
            continue
        found = instantiate(node)
        if not isinstance(found, L.Callback):
            raise UserError(f"callbacks.{name}._target_={node._target_} is not a Lightning callback; give one.")
        if isinstance(found, Checkpoint):
            raise UserError(
                f"callbacks.{name}._target_={node._target_} writes checkpoints, which a run does by itself "
                "(trainer.save_every_s, evaluation.save_best); leave it out."
            )
        made[str(name)] = found
    return made


def guarded(callbacks: dict[str, L.Callback]) -> list[L.Callback]:
    """The callbacks between two others that check them; nothing where there are none."""
    if not callbacks:
        return []
    before = CallbackGuard(callbacks)
    return [before, *callbacks.values(), CallbackGuardEnd(before)]


class CallbackGuard(L.Callback):
    """Records before every hook what the callbacks after it must leave alone.

    Args:
        callbacks: those callbacks, by name.
    """

    def __init__(self, callbacks: dict[str, L.Callback]) -> None:
        self.callbacks = callbacks
        self._noted: tuple[dict[str, Any], list[Tensor], bool] | None = None

    def note(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **named: Any) -> None:
        """Note random states, a sum of every tensor, and whether training shall stop."""
        self._noted = rng.state(), list(_sums(pl_module)), trainer.should_stop

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **named: Any) -> None:
        """Put random states back.

        Raises:
            UserError: weights, buffers or gradients are others, or training shall stop.
        """
        if self._noted is None:
            return
        states, sums, stops = self._noted
        self._noted = None
        rng.restore(states)
        names = ", ".join(f"callbacks.{name}" for name in self.callbacks)
        now = list(_sums(pl_module))
        if len(now) != len(sums) or not all(torch.equal(a, b) for a, b in zip(now, sums, strict=True)):
            raise UserError(f"{names}: weights or gradients were changed, and callbacks may only look; leave it out.")
        if trainer.should_stop != stops:
            raise UserError(f"{names}: training was asked to stop; evaluation.patience ends stages early.")

    on_train_start = note
    on_train_epoch_start = note
    on_train_batch_start = note
    on_before_backward = note
    on_after_backward = note
    on_before_optimizer_step = note
    on_before_zero_grad = note
    on_train_batch_end = note
    on_train_epoch_end = note
    on_train_end = note


class CallbackGuardEnd(L.Callback):
    """The end of a guard: it comes after the callbacks.

    Args:
        guard: its beginning.
    """

    def __init__(self, guard: CallbackGuard) -> None:
        self.guard = guard

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **named: Any) -> None:
        """See `CallbackGuard.check`."""
        self.guard.check(trainer, pl_module)

    on_train_start = check
    on_train_epoch_start = check
    on_train_batch_start = check
    on_before_backward = check
    on_after_backward = check
    on_before_optimizer_step = check
    on_before_zero_grad = check
    on_train_batch_end = check
    on_train_epoch_end = check
    on_train_end = check


def _sums(module: L.LightningModule) -> Iterator[Tensor]:
    """The norms of the trained weights, of their gradients, and of all buffers; of a shard those of this rank."""
    assert isinstance(module, StageModule)
    trained = [parameter for _, _, parameter in module.trained()]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    buffers = [buffer for buffer in module.model.buffers() if buffer.is_floating_point()]
    for tensors in (trained, gradients, buffers):
        if tensors:
            yield torch.stack(torch._foreach_norm([own(one.detach()) for one in tensors])).nan_to_num()

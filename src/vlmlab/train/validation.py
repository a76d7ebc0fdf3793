"""Validation during a stage: losses on held-out samples and slices of benchmarks, with right and with wrong images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

import lightning as L
import torch
import torch.distributed as dist

from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.faults import no_memory
from vlmlab.contracts.sample import SampleSource
from vlmlab.engine import rng
from vlmlab.engine.finite import as_evaluated
from vlmlab.engine.stage import StageModule
from vlmlab.evaluate.baselines import Shuffled
from vlmlab.model.vlm import VLM
from vlmlab.train.choice import Choice, Look

Loss = Callable[[VLM, SampleSource], float]
Write = Callable[[Mapping[str, object]], None]
Say = Callable[[str], None]


class BenchmarkSlice(Protocol):
    """A slice of a benchmark."""

    def scores(self, model: VLM) -> Mapping[str, float]:
        """Its scores by name."""
        ...


class Validation(L.Callback):
    """Before a stage's first step, every so many steps, and after the last: a row of numbers in ``metrics.jsonl``.

    ``held_out/loss`` is that of the stage's own samples, ``held_out/shuffled_loss`` of the same with another sample's
    images: what lies between them is what the model takes from the images. Of further samples they are
    ``held_out/<name>/loss`` and ``held_out/<name>/shuffled_loss``, of slices ``slice/<benchmark>/<score>``. Training is
    not changed by a bit: modes, random states and gradients are restored, and it runs on one rank.

    Args:
        sources: held-out samples by name; the stage's own have an empty one.
        loss: (model, samples) -> nats per supervised token.
        every: optimizer steps between two validations.
        write: takes a row.
        slices: of benchmarks.
        max_share: most of the time since the stage began that slices take: where one would take more, that validation
            is without; the first has them. None: every one has them.
        keep: keeps the best weights so far, and decides when the stage is over; None: nothing is chosen.
        say: takes a line.
        compiled: whether the layers are compiled; validation runs eagerly, since its graphs would count against
            training's limit.
    """

    def __init__(
        self,
        sources: Mapping[str, SampleSource],
        loss: Loss,
        every: int,
        write: Write,
        slices: Sequence[BenchmarkSlice] = (),
        max_share: float | None = None,
        keep: KeepBest | None = None,
        say: Say = lambda text: None,
        compiled: bool = False,
    ) -> None:
        self.sets: dict[str, SampleSource] = {}
        for name, source in sources.items():
            place = f"held_out/{name}/" if name else "held_out/"
            self.sets |= {f"{place}loss": source, f"{place}shuffled_loss": Shuffled(source)}
        self.loss, self.every, self.write, self.slices, self.keep, self.say = loss, every, write, slices, keep, say
        self.max_share, self.compiled = max_share, compiled
        self._began = time.perf_counter()
        self._looks = self._asked = 0
        self.seconds = self._of_slices = self._last_slices = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate before the first step, unless the stage is resumed."""
        assert isinstance(module, StageModule)
        self._began = time.perf_counter()
        if not module.done:
            self._validate(trainer, module)
        self._end_early(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        """After every optimizer step."""
        assert isinstance(module, StageModule)
        if module.done % self.every == 0 or module.done == module.stage.steps:
            self._validate(trainer, module)
            self._end_early(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Report what part of the stage's time validation took."""
        if not self._looks:
            return
        share = self.seconds / max(time.perf_counter() - self._began, 1e-9)
        asked = f", {self._asked} of them with slices" if self.slices else ""
        self.say(f"validation: {self._looks} times{asked}; {self.seconds:.1f} s, {share:.0%} of this stage's time")

    def _validate(self, trainer: L.Trainer, module: StageModule) -> None:
        model, began = module.model, time.perf_counter()
        if not trainer.is_global_zero or not isinstance(model, VLM):
            return
        self._looks += 1
        with self._evaluation_mode(trainer, module, model):
            numbers = {name: self.loss(model, samples) for name, samples in self.sets.items()}
            numbers |= self._slices(model)
        self.write({"stage": module.stage.name, "step": module.done, **numbers})
        if self.keep is not None:
            self.keep.see(module.done, numbers)
        self.seconds += time.perf_counter() - began

    def _slices(self, model: VLM) -> dict[str, float]:
        """Scores of all slices; none where they would take too much of the time."""
        began, last = time.perf_counter(), self._last_slices
        spent, within = self._of_slices + last, began - self._began + last
        if not self.slices or (self._asked and self.max_share is not None and spent > self.max_share * within):
            return {}
        self._asked += 1
        scores = {name: score for asked in self.slices for name, score in asked.scores(model).items()}
        self._last_slices = time.perf_counter() - began
        self._of_slices += self._last_slices
        return scores

    @contextmanager
    def _evaluation_mode(self, trainer: L.Trainer, module: StageModule, model: VLM) -> Iterator[None]:
        """Run as an evaluation does, and restore the training state.

        Raises:
            UserError: there is no memory for it.
        """
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        states = rng.state()
        try:
            with as_evaluated(model), trainer.precision_plugin.forward_context(), eager:
                yield
        except (RuntimeError, MemoryError) as error:
            if not no_memory(error):
                raise
            where = f"stage {module.stage.name}, after step {module.done}"
            raise UserError(
                f"{where}: validation ran out of memory; lower evaluation.batch_size, or set evaluation.every=null."
            ) from error
        finally:
            rng.restore(states)

    def _end_early(self, trainer: L.Trainer, module: StageModule) -> None:
        """End the stage on all ranks, where rank 0 has waited long enough."""
        if self.keep is None or self.keep.choice.patience is None or module.done >= module.stage.steps:
            return
        over = trainer.is_global_zero and self.keep.over()
        if trainer.world_size > 1:
            flag = torch.tensor(int(over), device=module.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            over = bool(flag)
        if over:
            trainer.should_stop = True


class KeepBest:
    """The best validation of a stage so far.

    Args:
        choice: the number that decides.
        looks: validations of the same stage before this process.
        save: keeps the weights as they are after a step that has this number.
        since: of `looks`, those from this step on count for what is kept.
    """

    def __init__(
        self, choice: Choice, looks: Sequence[Look], save: Callable[[int, float], None], since: int = 0
    ) -> None:
        self.choice, self.looks, self.save, self.since = choice, list(looks), save, since

    def see(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take a validation's numbers, and keep the weights where it is the best.

        Raises:
            UserError: the number that decides is not among them.
        """
        value = self.choice.value(numbers)
        if value is None:
            raise UserError(
                f"evaluation.monitor={self.choice.monitor} is not a validation score; choose one of "
                f"{listed([*numbers], 200)}, or held_out/gap."
            )
        best = self.best()
        self.looks.append((step, value))
        if self.choice.save and (best is None or self.choice.better(value, best[1])):
            self.save(step, value)

    def best(self) -> Look | None:
        """The best validation of those that were kept."""
        return self.choice.best(look for look in self.looks if look[0] >= self.since)

    def over(self) -> bool:
        """Whether the stage is over."""
        return self.choice.ends(self.looks)

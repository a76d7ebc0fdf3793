"""Watches a stage learn: the loss on held-out samples, with their own images and with others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning as L

from vlmlab.contracts.sample import SampleSource
from vlmlab.engine.finite import as_evaluated
from vlmlab.engine.stage import StageModule
from vlmlab.evaluate.baselines import Shuffled
from vlmlab.model.vlm import VLM

Loss = Callable[[VLM, SampleSource], float]
Write = Callable[[Mapping[str, object]], None]


class Watch(L.Callback):
    """Before a stage's first step, every so many steps, and after the last: a row of losses in ``metrics.jsonl``.

    ``held_out/loss`` is that of the stage's own samples, ``held_out/shuffled_loss`` of the same with another sample's
    images: what lies between them is what the model takes from the images. Of further samples they are
    ``held_out/<name>/loss`` and ``held_out/<name>/shuffled_loss``. Training is not disturbed by a bit.

    Args:
        sources: held-out samples by name; the stage's own have an empty one.
        loss: (model, samples) -> nats per supervised token.
        every: optimizer steps between two looks.
        write: takes a row.
    """

    def __init__(self, sources: Mapping[str, SampleSource], loss: Loss, every: int, write: Write) -> None:
        self.sets: dict[str, SampleSource] = {}
        for name, source in sources.items():
            place = f"held_out/{name}/" if name else "held_out/"
            self.sets |= {f"{place}loss": source, f"{place}shuffled_loss": Shuffled(source)}
        self.loss, self.every, self.write = loss, every, write

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Look before the first step; a stage that goes on has looked."""
        assert isinstance(module, StageModule)
        if not module.done:
            self._look(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        """After every optimizer step."""
        assert isinstance(module, StageModule)
        if module.done % self.every == 0 or module.done == module.stage.steps:
            self._look(trainer, module)

    def _look(self, trainer: L.Trainer, module: StageModule) -> None:
        model = module.model
        if not trainer.is_global_zero or not isinstance(model, VLM):
            return
        with as_evaluated(model), trainer.precision_plugin.forward_context():
            losses = {name: self.loss(model, samples) for name, samples in self.sets.items()}
        self.write({"stage": module.stage.name, "step": module.done, **losses})

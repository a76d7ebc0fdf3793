"""The thin LightningModule under every stage: optimizer groups, freezing, and one optimizer step.

One training step is one optimizer step: its item holds all micro-batches of this rank, so that

    loss = sum over objectives of weight * (sum over micro-batches and ranks) / (count over micro-batches and ranks)

is exact, whatever the number of ranks, micro-batches and tokens in each. Gradients are summed over ranks once per step,
here rather than by DDP's hooks: a rank whose micro-batches touch no image then does not hang, and a tensor that no rank
used has no gradient, as on one rank. Shards (``vlmlab.engine.shards``) are summed by FSDP2 after every backward pass;
ranks then go through the same layers together (`in_step` of the model's forward pass).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning as L
import torch
import torch.distributed as dist
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW, Optimizer

from vlmlab.contracts.errors import OutOfMemory, UserError, listed
from vlmlab.contracts.faults import no_memory
from vlmlab.contracts.parts import Fusion, Objective
from vlmlab.contracts.sample import Sample
from vlmlab.contracts.tensors import Batch, Outputs
from vlmlab.data.module import Window
from vlmlab.engine.finite import as_evaluated, nonfinite
from vlmlab.engine.layers import decayed
from vlmlab.engine.optim import MuonAdamW, hidden_matrices
from vlmlab.engine.shards import clip, is_shard, total_norm
from vlmlab.recipe.stage import Stage

BUCKET = 1 << 25
"""Elements of gradient that travel between ranks together (128 MiB of fp32)."""


class NonFinite(UserError):
    """The loss or the gradient became infinite or not a number.

    Attributes:
        facts: stage, step, losses and sample ids, for ``nonfinite.json``.
    """

    def __init__(self, stage: str, step: int, what: str, losses: Mapping[str, float], samples: list[str]) -> None:
        self.facts = {"stage": stage, "step": step, "what": what, "losses": dict(losses), "samples": samples}
        super().__init__(
            f"stage {stage}, step {step}: {what} is not finite (samples {listed(samples, 100)}; all in nonfinite.json)"
            f"; lower recipe.stages.{stage}.train or use precision=fp32."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        f = self.facts
        return NonFinite, (f["stage"], f["step"], f["what"], f["losses"], f["samples"])


@dataclass
class StepReport:
    """What one optimizer step did, over all ranks.

    Attributes:
        loss: the weighted sum of all objectives.
        losses: every objective's own value, before its weight.
        gradient_norm: before clipping.
        samples: rows of all micro-batches.
        tokens: positions that are not padding.
        supervised: tokens with a label.
    """

    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0


class StageModule(L.LightningModule):
    """One stage of one model.

    Args:
        model: a ``VLM`` or ``DualEncoder``; the same object in all stages that share it.
        stage: what trains, how fast and for how long.
        objectives: the losses, by name.
        rates: learning rate of what trains, by the key of ``train`` (the stage's, or its adapter's own).

    Attributes:
        prompt: how captions are asked for where the stage does not say: "plain" or "chat".
        caches: whether it compares the samples of all micro-batches with each other, by objectives of embeddings alone.
        done: optimizer steps finished in this stage.
        pending: trainable tensors that have had no gradient so far.
        report: of the last step.
        shard: cuts the model's weights into shards; None: every rank has all of them.
    """

    prompt: ClassVar[str] = "chat"
    caches: ClassVar[bool] = False

    @staticmethod
    def build(cfg: DictConfig) -> nn.Module:
        """The model this kind of stage trains."""
        from vlmlab.model.build import build_model

        return build_model(cfg)

    @staticmethod
    def collator(cfg: DictConfig, model: nn.Module, prompt: str) -> Callable[[list[Sample]], Batch]:
        """Samples to a micro-batch for this model."""
        from vlmlab.model.build import build_collator

        return build_collator(cfg, model, prompt)  # type: ignore[arg-type]

    def __init__(
        self, model: nn.Module, stage: Stage, objectives: Mapping[str, Objective], rates: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.stage = stage
        self.objectives = dict(objectives)
        self.rates = dict(rates)
        self.done = 0
        self.report = StepReport()
        self.shard: Callable[[DeviceMesh], None] | None = None
        self.pending = {name for name, _, _ in self.trained()}
        self._counts: dict[str, float] = {}
        check_objectives(stage, self.objectives)

    # -- what trains ---------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Cut the weights, after the ranks have met and before the optimizer is made."""
        if self.shard is not None and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            self.shard(self.device_mesh["data_parallel"])

    def trained(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """``(name, key of train, parameter)`` of everything this stage trains, in a fixed order."""
        for part, named in self.model.parts().items():  # type: ignore[operator]
            for name, parameter in named:
                key = self.stage.deciding(part, name)
                if key in self.rates and parameter.requires_grad:  # of a part in a range of layers, only those
                    yield name, key, parameter

    def configure_optimizers(self) -> Optimizer:
        """Groups by key of ``train``: matrices with weight decay; vectors, and what a fusion asks for, without."""
        ratios: Mapping[str, float] = getattr(self.model, "ratios", dict)()  # an adapter's, as in LoRA+
        by_layer = decayed(self.model, self.stage)
        hidden = hidden_matrices(self.model) if self.stage.optimizer == "muon" else set()
        fusion = getattr(self.model, "fusion", None)
        kept = {id(p) for p in fusion.undecayed()} if isinstance(fusion, Fusion) else set()
        groups: dict[tuple[str, bool, float, bool], list[nn.Parameter]] = {}
        for name, part, parameter in self.trained():
            ratio = ratios.get(name, 1.0) * by_layer.get(id(parameter), 1.0)
            key = (part, parameter.ndim >= 2 and id(parameter) not in kept, ratio, id(parameter) in hidden)
            groups.setdefault(key, []).append(parameter)
        decay = self.stage.weight_decay
        named = [
            {"params": params, "part": part, "ratio": ratio, "muon": muon, "weight_decay": decay if matrix else 0.0}
            for (part, matrix, ratio, muon), params in groups.items()
        ]
        if any(group["muon"] for group in named):
            return MuonAdamW(named, betas=self.stage.betas)
        return AdamW(named, lr=0.0, betas=self.stage.betas)  # the rate is set before every step

    # -- one step ------------------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Window, device: torch.device, dataloader_idx: int) -> Window:
        """Count what the losses divide by, then move the micro-batches."""
        self._counts = self._announce(batch)
        return batch.to(device)

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimizer step over all micro-batches of all ranks.

        Raises:
            OutOfMemory: it does not fit.
        """
        if window.error is not None:
            raise window.error
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        factor = self.stage.factor(self.done)
        for group in optimizer.param_groups:
            group["lr"] = self.rates[group["part"]] * group.get("ratio", 1.0) * factor
        self._moving, self._batch = False, max(window.batches, key=lambda batch: batch.input_ids.numel())
        try:
            optimizer.step(closure=lambda: self._backward(window))
        except (RuntimeError, MemoryError) as error:
            if not no_memory(error):
                raise
            raise self._out_of_memory() from error
        optimizer.zero_grad(set_to_none=True)
        self._check_last(window)
        self.done += 1

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip; runs after fp16's unscaling."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(gradients)
        self.report.gradient_norm = norm.item()
        if not self._scaled and not torch.isfinite(norm):
            raise NonFinite(self.stage.name, self.done + 1, "the gradient", self.report.losses, self._samples)
        if self.stage.gradient_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip(parameters, self.stage.gradient_clip, norm)

    def _check_last(self, window: Window) -> None:
        """After the last step, which no other follows that would notice: weights and loss are numbers on all ranks.

        A cache counts who reads it and shards look together, so that there the weights alone are looked at.

        Raises:
            NonFinite: they are not; names the samples of the step.
        """
        if self.done + 1 < self.stage.steps:
            return
        wrong = nonfinite((name, parameter) for name, _, parameter in self.trained())
        looks = self.shard is None and not getattr(getattr(self.model, "cache", None), "keeps", False)
        losses: dict[str, float] = {}
        if looks and not wrong:
            with as_evaluated(self.model):
                total, terms = self._loss(window.batches[0])
            losses = {"loss": float(total), **{name: float(value) for name, value in terms.items()}}
        bad = bool(wrong) or not all(map(math.isfinite, losses.values()))
        if self._reduced(torch.tensor(float(bad), device=self.device)):
            what = f"{wrong[0]}, a weight," if wrong else "the loss after it"
            raise NonFinite(self.stage.name, self.done + 1, what, losses, self._gathered(self._samples))

    def _announce(self, window: Window) -> dict[str, float]:
        """Counts of the whole step over all ranks, before any forward pass."""
        counts: dict[str, float] = {"rows": 0, "tokens": 0, "supervised": 0, "broken": float(window.error is not None)}
        for batch in window.batches:
            counts["rows"] += batch.input_ids.shape[0]
            counts["tokens"] += int(batch.layout.valid.sum())
            counts["supervised"] += batch.supervised
        counts |= {f"images {k}": 0 for k in range(self.stage.accumulate if self.shard is not None else 0)}
        for k, batch in enumerate(window.batches if self.shard is not None else ()):
            counts[f"images {k}"] = batch.pixels.shape[0]
        for name, objective in self.objectives.items():
            if (count := getattr(objective, "counts", None)) is not None and not objective.per_micro_batch:
                for batch in window.batches:
                    for term, number in count(batch).items():
                        counts[f"{name}/{term}"] = counts.get(f"{name}/{term}", 0) + float(number)
        totals = self._reduced(torch.tensor(list(counts.values()), dtype=torch.float64, device=self.device))
        counts = dict(zip(counts, totals.tolist(), strict=True))
        if counts["broken"] and window.error is None:
            raise UserError(f"stage {self.stage.name}: another rank could not read its data; its message says why.")
        return counts

    def _backward(self, window: Window) -> Tensor:
        """Forward and backward of every micro-batch; leaves the summed gradients and ``report``."""
        self._samples = [sample for batch in window.batches for row in batch.sample_ids for sample in row]
        sums: list[Tensor] = []
        no_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        for k, batch in enumerate(window.batches):
            self._batch = batch
            with no_sync():
                total, terms = self._loss(batch, in_step=self._counts.get(f"images {k}", 0) > 0)
                if total.requires_grad:  # text alone says nothing to a connector
                    with torch.autocast(self.device.type, enabled=False):
                        self.manual_backward(total)
            if isinstance(self.model, FSDPModule):
                self.model.reshard()  # what is outside the layers, which stays whole where nothing came back to it
            sums.append(torch.stack([total.detach().double(), *(value.double() for value in terms.values())]))
        names = ["loss", *terms]
        self._finish_report(names, torch.stack(sums), window)
        self._sum_gradients()
        self._moving = True
        return torch.tensor(self.report.loss)

    def _loss(self, batch: Batch, in_step: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch's part of the step's loss, and of every objective's value."""
        return self._weighed(self.model(batch, in_step=in_step), batch)

    def _weighed(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all objectives by their weights, and the value of each."""
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            for term, (value, count) in objective(outputs, batch).items():
                part = value / self._total(name, term, objective, count)
                total = objective.weight * part if total is None else total + objective.weight * part
                values[term] = values.get(term, 0) + part.detach()
        assert total is not None
        return total, values

    def _total(self, name: str, term: str, objective: Objective, count: Any) -> Tensor | float:
        """What a term divides by: its count over the whole step and all ranks."""
        if objective.per_micro_batch:
            number = torch.as_tensor(count, dtype=torch.float64, device=self.device).reshape(1)
            return self._reduced(number.clone())[0].clamp(min=1.0).to(torch.float32)
        return max(self._counts.get(f"{name}/{term}", self._counts["supervised"]), 1.0)

    def _finish_report(self, names: list[str], sums: Tensor, window: Window) -> None:
        """Sum over micro-batches and ranks; stop on all ranks where one is not finite."""
        bad = ~torch.isfinite(sums).all(1)
        totals = self._reduced(torch.cat([sums.nan_to_num().sum(0), bad.any().double()[None]])).tolist()
        counts = self._counts
        self.report = StepReport(
            loss=totals[0],
            losses=dict(zip(names[1:], totals[1:-1], strict=True)),
            samples=int(counts["rows"]),
            tokens=int(counts["tokens"]),
            supervised=int(counts["supervised"]),
        )
        if totals[-1]:
            own = [b for b, broken in zip(window.batches, bad.tolist(), strict=True) if broken]
            samples = self._gathered([sample for batch in own for row in batch.sample_ids for sample in row])
            losses = dict(zip(names, sums.sum(0).tolist(), strict=True))
            raise NonFinite(self.stage.name, self.done + 1, "the loss", losses, samples)

    def _out_of_memory(self) -> OutOfMemory:
        """What did not fit."""
        batch = self._batch
        row = int(batch.layout.valid.sum(1).argmax())
        length, answered = int(batch.layout.valid[row].sum()), int((batch.labels[row] != -100).sum())
        image = int(batch.layout.visual.sum()) // max(1, batch.pixels.shape[0])
        samples, asked = sum(map(len, batch.sample_ids)), max(0, length - answered - image)
        return OutOfMemory(self.stage.name, self.done + 1, samples, length, asked, answered, self._moving)

    @property
    def _scaled(self) -> bool:
        """Whether fp16's loss scaling is on; it passes over steps whose gradient is not finite itself."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    # -- ranks ---------------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def _reduced(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self._ranks > 1:
            dist.all_reduce(value)
        return value

    def _gathered(self, items: list[str]) -> list[str]:
        if self._ranks == 1:
            return items
        found: list[list[str]] = [[] for _ in range(self._ranks)]
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def _sum_gradients(self) -> None:
        """Sum gradients over ranks; a tensor that no rank used keeps none, as on one rank."""
        named = [(name, parameter) for name, _, parameter in self.trained()]
        used = [parameter.grad is not None for _, parameter in named]
        if self._ranks > 1:
            flags = torch.tensor(used, dtype=torch.int32, device=self.device)
            used = [bool(flag) for flag in self._reduced(flags).tolist()]
            found = (p for (_, p), is_used in zip(named, used, strict=True) if is_used and not is_shard(p))
            for bucket in _buckets(found):
                _all_reduce(bucket)
        if not any(used) and self._scaled:  # fp16's scaling wants at least one gradient
            named[0][1].grad = torch.zeros_like(named[0][1])
        if self.pending:
            self.pending -= {name for (name, _), is_used in zip(named, used, strict=True) if is_used}


def check_objectives(stage: Stage, objectives: Mapping[str, Objective]) -> None:
    """Refuse accumulation for objectives that compare samples of one micro-batch, unless their gradients are cached.

    Raises:
        UserError: naming the stage's key.
    """
    for name, objective in objectives.items():
        if not objective.per_micro_batch or stage.accumulate == 1:
            continue
        if not (getattr(objective, "of_embeddings", False) and getattr(get_class(stage.module), "caches", False)):
            raise UserError(
                f"{stage.key('accumulate')}={stage.accumulate} is not possible with the objective {name}, which "
                "compares the samples of a micro-batch with each other; set it to 1."
            )


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _all_reduce(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(piece.view_as(parameter))  # type: ignore[union-attr]

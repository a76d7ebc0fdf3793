"""What a run says while it trains: rows of ``metrics.jsonl``, a bar or lines, the table before a stage."""

from __future__ import annotations

import hashlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vlmlab.contracts.terminal import tell
from vlmlab.engine.precision import Precision
from vlmlab.engine.stage import StageModule
from vlmlab.engine.weights import StagedModel
from vlmlab.mask.base import causal_on_text
from vlmlab.mask.causal import Causal
from vlmlab.recipe.stage import Stage
from vlmlab.runs.folder import RunFolder

LOG_EVERY = 10
LINE_EVERY = 0.1
WANDB_ID = "wandb_id"
"""Key of ``env.json``."""


class RunLogger(Logger):
    """Lightning's logger interface over the run folder's ``metrics.jsonl``; only rank 0 writes.

    Args:
        folder: the run.

    Attributes:
        module: of the present stage, which says where a row belongs that does not say it itself, as a callback's.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self.module: StageModule | None = None

    @property
    def name(self) -> str:
        """The run."""
        return self.folder.path.name

    @property
    def version(self) -> str:
        """There is one version of a run."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row."""
        where = {} if self.module is None else {"stage": self.module.stage.name, "step": self.module.done}
        self.folder.log({**where, **metrics})


def wandb_id(folder: RunFolder) -> str:
    """The id of W&B's run: made when a training begins, kept in ``env.json``, so that a resumed one has the same."""
    known = folder.env().get(WANDB_ID)
    if known is None:
        path = folder.path.resolve()
        begun = (path / "wandb").is_dir()  # by a version that named the run after its place
        known = hashlib.sha256(str(path).encode()).hexdigest()[:16] if begun else uuid.uuid4().hex[:16]
        folder.update_env(**{WANDB_ID: known})
    return str(known)


class Recorder(L.Callback):
    """Writes a row every few steps and at the last one, and keeps ``state.json`` current.

    Args:
        folder: the run.
        every: optimizer steps between rows.
        write: takes a row.
    """

    def __init__(self, folder: RunFolder, every: int, write: Callable[[Mapping[str, Any]], None]) -> None:
        self.folder, self.every, self.write = folder, max(1, every), write
        self._since, self._samples = time.perf_counter(), 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since, self._samples = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """After every optimizer step."""
        assert isinstance(pl_module, StageModule)
        stage, done = pl_module.stage, pl_module.done
        self._samples += pl_module.report.samples
        if done % self.every and done not in (1, stage.steps):
            return
        now = time.perf_counter()
        row = row_of(pl_module, self._samples / max(now - self._since, 1e-9))
        self._since, self._samples = now, 0
        if trainer.is_global_zero:
            self.write(row)
            self.folder.write_state("running", stage.name, done, stage.steps)


def row_of(module: StageModule, samples_per_s: float) -> dict[str, Any]:
    """One row of ``metrics.jsonl``."""
    report, stage = module.report, module.stage
    factor = stage.factor(module.done - 1)
    return {
        "stage": stage.name,
        "step": module.done,
        "loss": report.loss,
        **{f"loss/{name}": value for name, value in report.losses.items()},
        **{f"lr/{part}": rate * factor for part, rate in module.rates.items()},
        "gradient_norm": report.gradient_norm,
        "tokens": report.tokens,
        "labelled_fraction": report.supervised / max(report.tokens, 1),
        "samples_per_s": round(samples_per_s, 2),
    }


class Progress(L.Callback):
    """A bar on a terminal; a line every tenth of a stage elsewhere.

    Args:
        setting: "auto", True (a bar) or False (lines).
        out: where to.
    """

    def __init__(self, setting: str | bool = "auto", out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._on = self._out.isatty() if setting == "auto" else bool(setting)
        self._bar: Any = None
        self._said = 0.0
        self._began, self._first = time.perf_counter(), 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, StageModule)
        self._began, self._first = time.perf_counter(), pl_module.done
        self._said = pl_module.done / max(pl_module.stage.steps, 1)
        if self._on and trainer.is_global_zero:
            from tqdm import tqdm

            stage = pl_module.stage
            self._bar = tqdm(total=stage.steps, initial=pl_module.done, desc=stage.name, file=self._out)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move the bar, or say a line."""
        assert isinstance(pl_module, StageModule)
        stage, done, loss = pl_module.stage, pl_module.done, pl_module.report.loss
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(1)
        elif trainer.is_global_zero and (done / stage.steps >= self._said + LINE_EVERY - 1e-9 or done == stage.steps):
            self._said = done / stage.steps
            spent = time.perf_counter() - self._began
            left = spent / max(done - self._first, 1) * (stage.steps - done)
            line = f"{stage.name}  step {done}/{stage.steps}  loss {loss:.4f}  {spent:.0f} s, {left:.0f} s to go"
            tell(line, self._out)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar, also after an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def stage_table(stage: Stage, staged: StagedModel, precision: Precision, prompt: str, samples: int) -> str:
    """What is printed before a stage's first step: part, parameters, trainable, learning rate; the rest in words."""
    rows = [("part", "parameters", "trainable", "learning rate")]
    for part, size, trained, rate in staged.table(stage):
        rows.append((part, f"{size:,}", f"{trained:,}" if trained else "-", "frozen" if rate is None else f"{rate:g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}" for r in rows]
    adapter = target(stage.adapter) if staged.adapted else "none"
    facts = [
        f"mask {target(stage.mask)}, objective {target(stage.objective)}, adapter {adapter}, prompt {prompt}",
        f"data {stage.data} ({samples:,} samples), {stage.steps} steps of {stage.batch_size} samples"
        + (f" in {stage.accumulate} micro-batches" if stage.accumulate > 1 else ""),
        f"precision {precision.shown} ({precision.why})",
    ]
    fusion, mask = (getattr(staged.model, name, None) for name in ("fusion", "mask"))
    no_place = getattr(fusion, "in_sequence", True) is False
    if no_place and mask is not None and not isinstance(mask, Causal) and causal_on_text(mask):
        facts.append(
            f"note: mask {target(stage.mask)} acts as causal here: this fusion puts no visual token into the sequence"
        )
    return "\n".join([*lines, *facts])


def target(config: Mapping[str, Any] | None) -> str:
    """The class a configuration makes, in one word; several joined by +."""
    if not config:
        return "none"
    if "_target_" in config:
        return str(config["_target_"]).rsplit(".", 1)[-1]
    return " + ".join(target(value) for value in config.values() if isinstance(value, Mapping))

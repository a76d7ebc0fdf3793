"""A run at Weights & Biases: one per training, whatever interrupts it, with its samples to look at.

Rows of one W&B run must not have the same number, of which all but one would be dropped: they are counted in the run
folder, beside the id, so that a run that goes on, offline in another folder of its own, goes on counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.evaluate.baselines import Limited, Shuffled
from vlmlab.evaluate.gallery import side_by_side
from vlmlab.evaluate.metrics.rows import Row, read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.evaluate.metrics.vqa import VqaAccuracy
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.tracking import Counted, begun, group_of, name_of
from vlmlab.runs.withheld import stored
from vlmlab.train.record import wandb_id
from vlmlab.train.summary_logger import SummaryLogger

STOPPED = 128
"""Exit codes above are of signals."""

COLUMNS = ("image", "kind", "question", "references", "answer", "score", "wrong image", "answer to it")


class WandbRun(WandbLogger, SummaryLogger):
    """Lightning's logger with one axis of steps over all stages; offline without a key, and never a prompt.

    Args:
        cfg: the run's configuration; ``logger`` has the keys of this.
        folder: of the run.
    """

    def __init__(self, cfg: DictConfig, folder: RunFolder) -> None:
        keys = cfg.logger
        self.mode, self.x_axis = str(keys.get("mode") or "auto"), str(keys.get("x_axis") or "step")
        self.samples = int(32 if keys.get("samples") is None else keys.samples)
        self.rows = Counted(folder.path, wandb_id(folder))
        super().__init__(
            name=name_of(folder.path),
            save_dir=str(folder.path.resolve()),
            id=self.rows.id,
            project=keys.get("project") or "vlmlab",
            group=keys.get("group") or group_of(folder.path),
            resume="allow",
            entity=keys.get("entity"),
            tags=list(keys.get("tags") or []),
            config=stored(cfg),
            job_type=keys.get("job_type") or "train",
        )

    @property
    def experiment(self) -> Any:
        """W&B's run, begun where it is first asked for."""
        if self._experiment is None:
            self._experiment = begun(self._wandb_init, self.mode)
            for axis in ("step", "samples"):
                self._experiment.define_metric(axis, hidden=True)
            self._experiment.define_metric("*", step_metric=self.x_axis)
            for name in ("train/loss", "held_out/loss", "held_out/shuffled_loss"):
                self._experiment.define_metric(name, step_metric=self.x_axis, summary="min,last")
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; `step` is an optimizer step over all stages."""
        axis = {} if step is None else {"step": step}
        self.experiment.log({**metrics, **axis}, step=self.rows.next())

    def finalize(self, status: str) -> None:
        """Nothing where a stage ends; `end` is where the run does."""

    def summarise(self, cfg: DictConfig, folder: Path, scores: Mapping[str, float], cost: Mapping[str, float]) -> None:
        """Scores and costs as the summary; a table of samples for every benchmark."""
        import wandb

        self.experiment.summary.update({**scores, **cost})
        named = [str(name) for name in cfg.data.get("benchmarks") or () if predictions_file(folder, name).is_file()]
        for name in named if self.samples else ():
            table = wandb.Table(columns=list(COLUMNS))
            for row in islice(samples_of(cfg, folder, name), -(-self.samples // len(named))):
                right, wrong = (None if image is None else wandb.Image(image) for image in (row[0], row[6]))
                table.add_data(right, *row[1:6], wrong, row[7])
            self.experiment.log({f"samples/{name}": table}, step=self.rows.next())

    def end(self, code: int) -> None:
        """Finish W&B's run; one that a signal has stopped is marked as resumable."""
        if self._experiment is not None:
            if code > STOPPED:
                self._experiment.mark_preempting()
            self._experiment.finish(exit_code=code)


def samples_of(cfg: DictConfig, folder: Path, name: str) -> Iterator[tuple[Any, ...]]:
    """The first questions of a benchmark as `COLUMNS`, with the pictures themselves (None where there is none).

    Args:
        cfg: the run's configuration.
        folder: of the run, with its predictions.
        name: of the benchmark.
    """
    source = Limited(instantiate(cfg.data.benchmarks[name].source), cfg.budget.eval_limit)
    others, wrong_file = Shuffled(source), predictions_file(folder, name, "shuffled")
    wrong = read_rows(wrong_file) if wrong_file.is_file() else []
    for index, row in enumerate(read_rows(predictions_file(folder, name))):
        images, other = source[index].images, others[index].images if index < len(wrong) else ()
        yield (
            side_by_side(images) if images else None,
            row.kind,
            row.prompt.replace(IMAGE_TAG, "").strip(),
            " / ".join(dict.fromkeys(row.references)),
            row.prediction,
            _score(row),
            side_by_side(other) if other else None,
            wrong[index].prediction if index < len(wrong) else "",
        )


def _score(row: Row) -> float | None:
    """VQA accuracy of one answer; None where it has no reference."""
    return VqaAccuracy().score(row) if row.references else None

"""What a run does about rows that cannot be used: looks before it trains, writes down, ends where they are too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.sample import Sample, SampleSource
from vlmlab.data.module import Window
from vlmlab.data.skipped import Skipped, check_share, note, noted, screen
from vlmlab.recipe.stage import Stage

Collate = Callable[[list[Sample]], Any]


class Skips(L.Callback):
    """Bad rows of one stage's data.

    In generated data, or without ``data.max_bad_fraction``, the first bad row ends the run. Otherwise the next usable
    row replaces a bad one, ``skipped.jsonl`` says so, and more than that share of the data set ends the run.

    Args:
        cfg: the configuration; read are ``data.max_bad_fraction`` and ``data.screen``.
        stage: the stage.
        source: its samples.
        folder: the run folder.
        writes: whether this process is rank 0.
    """

    def __init__(self, cfg: DictConfig, stage: Stage, source: SampleSource, folder: Path, writes: bool) -> None:
        share = OmegaConf.select(cfg, "data.max_bad_fraction")
        read = hasattr(source, "skipped")  # out of files; what is generated has no bad rows to expect
        self.limit = float(share) if share is not None and read else None
        self.rows = int(OmegaConf.select(cfg, "data.screen") or 0)
        self.key = f"data.train.{stage.data}"
        self.folder, self.writes, self.source = folder, writes, source
        self.total = len(source) + len(self._known())
        if writes:
            note(folder, self.key, self._known())

    @property
    def replaces(self) -> bool:
        """Whether other rows may replace bad ones."""
        return self.limit is not None

    def look(self, collate: Collate) -> None:
        """Load and collate up to ``data.screen`` rows before the first step.

        Raises:
            TooManyBad: more than the share is bad; ``skipped.jsonl`` has them.
        """
        if self.limit is None or not self.rows:
            return
        bad: list[Skipped] = []
        try:
            bad = screen(self.source, lambda sample: collate([sample]), self.rows, self.limit, self.key)
        except Exception as error:
            bad = getattr(error, "skipped", [])
            raise
        finally:
            if self.writes:
                note(self.folder, self.key, bad)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Window, batch_idx: int
    ) -> None:
        """Write down what this rank has met; raises TooManyBad where all ranks together have met too many."""
        if self.limit is None or not batch.skipped:
            return
        if note(self.folder, self.key, batch.skipped) > self.limit * self.total:
            check_share(self._noted(), self.total, self.limit, self.key)

    def _known(self) -> Sequence[Skipped]:
        return list(getattr(self.source, "skipped", []))

    def _noted(self) -> list[Skipped]:
        rows = noted(self.folder)
        return [Skipped(str(row["id"]), str(row.get("reason", ""))) for row in rows if row["data"] == self.key]

"""``csv``: rows of numbers, one file a process."""

from __future__ import annotations

from lightning.pytorch.loggers import CSVLogger

from vlmlab.contracts.values import Text


class Csv(CSVLogger):
    """``<save_dir>/csv/version_<n>/metrics.csv``, written row by row, so that a killed run loses none.

    Args:
        save_dir: None becomes the run folder.
    """

    def __init__(self, save_dir: Text | None = None) -> None:
        super().__init__(save_dir or ".", name="csv", flush_logs_every_n_steps=1)

"""``tensorboard``: curves for ``tensorboard --logdir``."""

from __future__ import annotations

from lightning.pytorch.loggers import TensorBoardLogger

from vlmlab.contracts.values import Positive, Text


class TensorBoard(TensorBoardLogger):
    """Event files in ``<save_dir>/tensorboard``, of all processes of a run together.

    Args:
        save_dir: None becomes the run folder.
        flush_s: seconds until a row is in the file.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, save_dir: Text | None = None, flush_s: Positive = 5.0) -> None:
        seconds = max(1, round(flush_s))
        super().__init__(save_dir or ".", name="tensorboard", version="", flush_secs=seconds)

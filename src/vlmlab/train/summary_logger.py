"""The interface of a logger that also takes a summary of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig


class SummaryLogger(Logger):
    """A logger that takes a summary of a run beside its rows, and the exit code of the run."""

    @abstractmethod
    def summarise(self, cfg: DictConfig, folder: Path, scores: Mapping[str, float], cost: Mapping[str, float]) -> None:
        """Take the final numbers, and look at the run's predictions."""

    @abstractmethod
    def end(self, code: int) -> None:
        """The run has ended with this exit code."""

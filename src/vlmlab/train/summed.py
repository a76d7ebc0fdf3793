"""What a logger is that has more than rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig


class Summed(Logger):
    """A logger that has a summary of a run beside its rows, and is told how the run ended."""

    @abstractmethod
    def summarise(self, cfg: DictConfig, folder: Path, scores: Mapping[str, float], cost: Mapping[str, float]) -> None:
        """Take the final numbers, and look at the run's predictions."""

    @abstractmethod
    def end(self, code: int) -> None:
        """The run has ended with this exit code."""

"""A place where cells run that is not a process: each look at a job is one tick of its life."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.vlmlab_pool_launcher import _cells, _pool
from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from hydra_plugins.vlmlab_pool_launcher._job import Start
from vlmlab.runs.config import plain

Life = Callable[[Cell, int], int | None]
"""What a cell does at a tick: None, or its exit code."""


@dataclass
class PretendJob:
    """A cell that lives as `life` says."""

    cell: Cell
    life: Life
    ticks: int = 0
    code: int | None = None
    sent: list[int] = field(default_factory=list)

    def waits(self) -> str:
        return ""

    def poll(self) -> int | None:
        if self.code is None:
            self.ticks += 1
            self.code = 143 if self.sent else self.life(self.cell, self.ticks)
        return self.code

    def send(self, number: int) -> None:
        self.sent.append(number)

    def kill(self) -> None:
        self.code = self.code if self.code is not None else -9


class Pretend:
    """Runs cells by `life`, and keeps when each began."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.begun: list[str] = []
        self.together: list[list[str]] = []
        self.closed = False

    def needs(self, cell: Cell) -> int:
        return cell.devices

    def start(self, starts: Sequence[Start]) -> None:
        for one in starts:
            self.begun.append(one.cell.name)
            one.cell.process = PretendJob(one.cell, self.life)
        self.together.append([one.cell.name for one in starts])

    def close(self) -> None:
        self.closed = True


@contextmanager
def loaded(folder: Path, conf: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConfigLoader]:
    """The loader of a small application whose configuration is this text."""
    (folder / "conf").mkdir()
    (folder / "conf" / "train.yaml").write_text(conf)
    monkeypatch.setattr(_cells.rules, "admitted", lambda cfg, hydra_cfg, own=(): plain(cfg))  # its keys are not a run's
    monkeypatch.setattr(_pool, "POLL_S", 0.0)
    monkeypatch.chdir(folder)
    Plugins.instance()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def sweep_config(given: Sequence[str] = (), folder: str = "sweeps/s") -> DictConfig:
    """The configuration of a sweep, as Hydra hands it to a launcher."""
    config: Any = compose("train", overrides=list(given), return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.sweep.dir = folder
    HydraConfig.instance().set_config(config)
    return config

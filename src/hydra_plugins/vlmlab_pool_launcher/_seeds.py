"""One call of ``vlmlab plan -m``: the compositions and seeds of a sweep, and what they can show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from hydra_plugins.vlmlab_pool_launcher._cells import families, unique
from hydra_plugins.vlmlab_pool_launcher._sweep import CellReturn, planned, untrained
from vlmlab.contracts.terminal import tell


def print_seeds(
    config: DictConfig,
    loader: ConfigLoader,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    effect: float | None,
    power: float,
    pilot: str | None,
    metric: str | None,
) -> list[CellReturn]:
    """Print what the seeds of a sweep can show; nothing is trained.

    Args:
        config: the sweep's configuration.
        loader: composes the cells.
        job_overrides: of every cell, from the sweeper.
        first: number of the first cell.
        effect: as the rest, see `SeedsLauncherConf`.
        power: likewise.
        pilot: likewise.
        metric: likewise.
    """
    cells = planned(config, loader, job_overrides, first)
    from vlmlab.analyse.foretell import Claim, foretell  # numpy and scipy

    seeds = families(unique(cells))
    claim = Claim(len(seeds), max(seeds.values()), effect, power)
    tell("\n".join(foretell(claim, None if pilot is None else Path(pilot), metric)))
    return untrained(cells)

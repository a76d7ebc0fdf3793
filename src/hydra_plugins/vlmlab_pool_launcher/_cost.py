"""One call of ``vlmlab cost -m``: the compositions of a sweep beside each other, and what an answer of each costs."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from hydra_plugins.vlmlab_pool_launcher._cells import compose_cells, unique
from hydra_plugins.vlmlab_pool_launcher._sweep import CellReturn, folder_of, refuse_at_once, untrained
from vlmlab.cli.cost import checked_place, counted, lines, write_costs
from vlmlab.cli.entry import ConfigError
from vlmlab.cli.rules.schema import Cost
from vlmlab.contracts.terminal import tell
from vlmlab.runs.names import SEED


def print_costs(
    config: DictConfig, loader: ConfigLoader, job_overrides: Sequence[Sequence[str]], first: int
) -> list[CellReturn]:
    """Print the table of costs, and write it where ``out`` says; nothing is trained.

    Args:
        config: the sweep's configuration.
        loader: composes the cells.
        job_overrides: of every cell, from the sweeper.
        first: number of the first cell.

    Raises:
        ConfigError: a cell is impossible, or ``out`` or the seed is swept.
        UserError: a cell cannot be counted.
    """
    refuse_at_once(config, job_overrides)
    jobs = compose_cells(config, loader, job_overrides, first, folder_of(config), Cost)
    for key in ("out", SEED):
        if any(key in cell.swept for cell in jobs):
            raise ConfigError(f"{key} has several values and no cost depends on it; give one value")
    cells = unique(jobs)
    place = checked_place(cells[0].cfg)
    found = counted([(cell.swept, cell.cfg) for cell in cells])
    tell("\n".join(lines(found)))
    if place is not None:
        write_costs(place, found)
    return untrained(jobs)

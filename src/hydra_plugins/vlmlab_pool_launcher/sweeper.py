"""The sweepers: Hydra's own, which leaves composing the cells to a launcher that does, and a search by Optuna.

Hydra runs this file without entering it into ``sys.modules``: a dataclass here cannot have postponed annotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

TPE = {"_target_": "optuna.samplers.TPESampler", "constant_liar": True}
MEDIAN = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 4}


@dataclass
class CellsSweeperConf(BasicSweeperConf):
    """Keys below ``hydra.sweeper``, as Hydra's own has them."""

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.sweeper.CellsSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="cells", node=CellsSweeperConf, provider="vlmlab")


class CellsSweeper(BasicSweeper):
    """All combinations of the swept values."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every cell, for a launcher that composes each only when it starts; ours compose all before."""
        if not getattr(self.launcher, "composes_first", False):
            super().validate_batch_is_legal(batch)


@dataclass
class OptunaSweeperConf:
    """Keys below ``hydra.sweeper`` of ``sweep=optuna``.

    Attributes:
        trials: cells in all, those of earlier calls with the same folder counted.
        maximize: name of a number in ``result.json``, or a list of them; None: the first score of the table.
        minimize: likewise, costs as ``cost/flops_sample``.
        sampler: one of Optuna's, with its arguments but for the seed.
        pruner: likewise, used with `prune`.
        prune: number of ``metrics.jsonl``, as ``held_out/loss``, by which a cell is given up; None: none is.
        prune_direction: ``minimize`` where less of that number is better, or ``maximize``.
        seed: of the sampler.
        params: swept values of a choice, as Hydra's own sweeper has them.
    """

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.sweeper.OptunaSweeper"
    _recursive_: bool = False  # the sampler's seed is known when the search begins
    _convert_: str = "all"
    trials: int = 20
    maximize: Any = None
    minimize: Any = None
    sampler: dict[str, Any] = field(default_factory=lambda: dict(TPE))
    pruner: dict[str, Any] = field(default_factory=lambda: dict(MEDIAN))
    prune: str | None = None
    prune_direction: str = "minimize"
    seed: int = 0
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="vlmlab")


class OptunaSweeper(Sweeper):
    """Optuna's choice of the swept values, one cell whenever a slot is free."""

    def __init__(self, **search: Any) -> None:
        self.given = search

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over the sweep's configuration; the launcher gets the same."""
        from hydra.core.plugins import Plugins

        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search.

        Raises:
            UserError: it is impossible, or some cells did not finish.
        """
        from hydra_plugins.vlmlab_pool_launcher._search import Goals, Search
        from vlmlab.contracts.errors import UserError

        if not hasattr(self.launcher, "search"):
            raise UserError("sweep=optuna runs its cells by the launchers pool, slurm and ray; choose one of them")
        given = dict(self.given)
        params = [f"{key}={value}" for key, value in (given.pop("params") or {}).items()]
        goals = Goals.of(given.pop("maximize"), given.pop("minimize"))
        self.launcher.search(Search(words=[*params, *arguments], goals=goals, **given))

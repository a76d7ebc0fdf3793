"""The launcher that ``conf/train.yaml`` uses for ``-m``. Its parts are imported only when a sweep starts.

Hydra runs this file without entering it into ``sys.modules``: a dataclass here cannot have postponed annotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PoolLauncherConf:
    """Keys below ``hydra.launcher``.

    Attributes:
        slots: cells (devices, where a cell asks for several) at a time; None: one per visible GPU, or per 2 cores.
        timeout: seconds after which a cell is stopped; None: never.
        record: a CSV with a row a finished cell, made where it is not there; a cell with a row is not trained again.
    """

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.launcher.PoolLauncher"
    slots: int | None = None
    timeout: float | None = None
    record: str | None = None


ConfigStore.instance().store(group="hydra/launcher", name="pool", node=PoolLauncherConf, provider="vlmlab")


@dataclass
class SeedsLauncherConf(PoolLauncherConf):
    """Keys below ``hydra.launcher`` of ``vlmlab plan -m``, beside those that the sweep itself may set.

    Attributes:
        effect: difference to be found; None: the smallest that can be is said.
        power: chance to find it.
        pilot: folder of a finished sweep, which shows what seeds vary by.
        metric: of the pilot; None: the first of its table.
    """

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.launcher.SeedsLauncher"
    effect: float | None = None
    power: float = 0.8
    pilot: str | None = None
    metric: str | None = None


ConfigStore.instance().store(group="hydra/launcher", name="seeds", node=SeedsLauncherConf, provider="vlmlab")


@dataclass
class CostLauncherConf(PoolLauncherConf):
    """Keys below ``hydra.launcher`` of ``vlmlab cost -m``: those that the sweep itself may set."""

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.launcher.CostLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="cost", node=CostLauncherConf, provider="vlmlab")


class _Told(Launcher):
    """A launcher that keeps what Hydra tells it.

    Attributes:
        config: the sweep's configuration.
        hydra_context: with the loader that composes its cells.
    """

    config: DictConfig | None = None
    hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over the sweep's configuration, which is also the present one until a cell is composed."""
        HydraConfig.instance().set_config(config)
        self.config = config
        self.hydra_context = hydra_context


class SeedsLauncher(_Told):
    """Trains nothing: says how many seeds the comparisons of a sweep need."""

    def __init__(
        self,
        effect: float | None = None,
        power: float = 0.8,
        pilot: str | None = None,
        metric: str | None = None,
        **of_the_sweep: Any,
    ) -> None:
        self.wanted = (effect, power, pilot, metric)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every cell, print what its seeds can show, report every cell as done.

        Raises:
            UserError: a cell is impossible, or the pilot is none.
        """
        from hydra_plugins.vlmlab_pool_launcher._seeds import say_seeds

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return say_seeds(self.config, loader, job_overrides, initial_job_idx, *self.wanted)


class CostLauncher(_Told):
    """Trains nothing: says what answers of the compositions of a sweep cost."""

    def __init__(self, **of_the_sweep: Any) -> None: ...

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every cell, print the table, report every cell as done.

        Raises:
            UserError: a cell is impossible or cannot be counted.
        """
        from hydra_plugins.vlmlab_pool_launcher._cost import say_costs

        assert self.config is not None and self.hydra_context is not None
        return say_costs(self.config, self.hydra_context.config_loader, job_overrides, initial_job_idx)


class PoolLauncher(_Told):
    """Runs every cell of a sweep as its own process, whatever happens to the others, and writes the table."""

    def __init__(self, slots: int | None = None, timeout: float | None = None, record: str | None = None) -> None:
        self.slots = slots
        self.timeout = timeout
        self.record = record

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the cells that are not finished, print the table, report every cell to the sweeper.

        Raises:
            UserError: the slots cannot hold a cell, or the record cannot be read.
            KeyboardInterrupt: a signal stopped the sweep; cells were told and waited for.
        """
        from hydra_plugins.vlmlab_pool_launcher._sweep import run_sweep
        from vlmlab.runs.cells_csv import CellsCsv

        assert self.config is not None and self.hydra_context is not None
        record = CellsCsv(Path(self.record).expanduser()) if self.record else None
        arguments: dict[str, Any] = {"slots": self.slots, "timeout": self.timeout, "record": record}
        return run_sweep(self.config, self.hydra_context.config_loader, job_overrides, initial_job_idx, **arguments)

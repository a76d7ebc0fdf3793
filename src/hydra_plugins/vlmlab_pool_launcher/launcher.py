"""The launcher that ``conf/train.yaml`` uses for ``-m``. Its parts are imported only when a sweep starts.

Hydra runs this file without entering it into ``sys.modules``: a dataclass here cannot have postponed annotations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
        slots: cells (devices, where a cell asks for several) at a time; None: one per visible GPU, or per 2 cores; of
            a scheduler all that it lets run.
        devices_per_cell: devices of a cell with ``trainer.devices=-1``; None: all there are.
        timeout: seconds after which a cell is stopped; None: never.
        retries: how often a cell that failed is tried again by the same command.
        backoff: seconds before the first of these times, twice as long before each further one.
        stalled: seconds without a sign of life after which a cell is reported to make no progress; None: never.
        record: a CSV with a row a finished cell, made where it is not there; a cell with a row is not trained again.
    """

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.launcher.PoolLauncher"
    slots: int | None = None
    devices_per_cell: int | None = None
    timeout: float | None = None
    retries: int = 0
    backoff: float = 10.0
    stalled: float | None = 900.0
    record: str | None = None


ConfigStore.instance().store(group="hydra/launcher", name="pool", node=PoolLauncherConf, provider="vlmlab")


@dataclass
class SlurmLauncherConf(PoolLauncherConf):
    """Keys below ``hydra.launcher`` of ``sweep=slurm``, beside those of the pool.

    Attributes:
        cluster: ``slurm``; ``local``: the same as processes of this machine, to try it.
        partition: of the cluster; None: its default. Likewise account, qos and constraint.
        minutes: of a job; a cell that needs longer saves before, and goes on in the next run of its job.
        signal_s: seconds before the end of a job at which it is told to save.
        requeues: how often a job that has reached its minutes goes on; preempted ones always do.
        cpus: cores of a job on each machine.
        memory: GB of a job on each machine; None: the cluster's default.
        array: jobs of an array at a time.
        setup: lines of the script before the cell, as ``[module load cuda]``.
        more: further options of ``sbatch``, as ``{reservation: night}``.
    """

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.launcher.SlurmLauncher"
    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = 240
    signal_s: int = 120
    requeues: int = 100
    cpus: int = 4
    memory: float | None = None
    array: int = 256
    setup: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmLauncherConf, provider="vlmlab")


@dataclass
class RayLauncherConf(PoolLauncherConf):
    """Keys below ``hydra.launcher`` of ``sweep=ray``, beside those of the pool.

    Attributes:
        address: of a cluster, or ``auto``; None: one is started on this machine and ends with the sweep.
        cpus: that a cell takes for each of its devices.
    """

    _target_: str = "hydra_plugins.vlmlab_pool_launcher.launcher.RayLauncher"
    address: str | None = None
    cpus: float = 2.0


ConfigStore.instance().store(group="hydra/launcher", name="ray", node=RayLauncherConf, provider="vlmlab")


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


class _HydraLauncher(Launcher):
    """A launcher that keeps what Hydra tells it.

    Attributes:
        composes_first: every cell is composed before one runs.
        config: the sweep's configuration.
        hydra_context: with the loader that composes its cells.
    """

    composes_first = True
    config: DictConfig | None = None
    hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over the sweep's configuration, which is also the present one until a cell is composed.

        Raises:
            UserError: Hydra's sweeper would write ``multirun.yaml`` through a link, or into what is not a file.
        """
        from vlmlab.runs.files import refuse_no_file

        refuse_no_file(Path(str(config.hydra.sweep.dir)) / "multirun.yaml")
        HydraConfig.instance().set_config(config)
        self.config = config
        self.hydra_context = hydra_context


class SeedsLauncher(_HydraLauncher):
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
        from hydra_plugins.vlmlab_pool_launcher._seeds import print_seeds

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return print_seeds(self.config, loader, job_overrides, initial_job_idx, *self.wanted)


class CostLauncher(_HydraLauncher):
    """Trains nothing: says what answers of the compositions of a sweep cost."""

    def __init__(self, **of_the_sweep: Any) -> None: ...

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every cell, print the table, report every cell as done.

        Raises:
            UserError: a cell is impossible or cannot be counted.
        """
        from hydra_plugins.vlmlab_pool_launcher._cost import print_costs

        assert self.config is not None and self.hydra_context is not None
        return print_costs(self.config, self.hydra_context.config_loader, job_overrides, initial_job_idx)


class PoolLauncher(_HydraLauncher):
    """Runs every cell of a sweep as its own process, whatever happens to the others, and writes the table.

    Args:
        options: as for `PoolLauncherConf`.
    """

    def __init__(self, **options: Any) -> None:
        self.given = options

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the cells that are not finished, print the table, report every cell to the sweeper.

        Raises:
            UserError: the slots cannot hold a cell, or the record cannot be read.
            KeyboardInterrupt: a signal stopped the sweep; cells were told and waited for.
        """
        from hydra_plugins.vlmlab_pool_launcher._sweep import run_sweep

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return run_sweep(self.config, loader, job_overrides, initial_job_idx, self.options())

    def search(self, search: Any) -> None:
        """Run the cells that a search asks for, one by one; errors as for `launch`."""
        from hydra_plugins.vlmlab_pool_launcher._search import run_search

        assert self.config is not None and self.hydra_context is not None
        run_search(self.config, self.hydra_context.config_loader, search, self.options())

    def options(self) -> Any:
        """How the sweep is run."""
        from hydra_plugins.vlmlab_pool_launcher._pool import Patience
        from hydra_plugins.vlmlab_pool_launcher._sweep import Options
        from vlmlab.runs.cells_csv import CellsCsv

        given, record = self.given, self.given.get("record")
        patience = {key: given[key] for key in ("timeout", "retries", "backoff", "stalled") if key in given}
        return Options(
            slots=given.get("slots"),
            devices_per_cell=given.get("devices_per_cell"),
            patience=Patience(**patience),
            record=CellsCsv(Path(record).expanduser()) if record else None,
            site=self.site(),
        )

    def site(self) -> Callable[[Path], Any] | None:
        """Makes the place where cells run; None: this machine."""
        return None


class SlurmLauncher(PoolLauncher):
    """Runs every cell as a job of SLURM: arrays, which are preempted and go on."""

    def site(self) -> Callable[[Path], Any]:
        """Submitit's executor."""
        from hydra_plugins.vlmlab_pool_launcher._scheduled import Submitit, slurm_parameters

        cluster, requeues = str(self.given["cluster"]), int(self.given["requeues"])
        return lambda sweep: Submitit(sweep, cluster, slurm_parameters(self.given), requeues)


class RayLauncher(PoolLauncher):
    """Runs every cell as a task of Ray's."""

    def site(self) -> Callable[[Path], Any]:
        """A cluster of Ray's."""
        from hydra_plugins.vlmlab_pool_launcher._scheduled import Ray

        return lambda sweep: Ray(self.given["address"], float(self.given["cpus"]))

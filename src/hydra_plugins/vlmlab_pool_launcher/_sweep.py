"""One call of the launcher: plan, run, table, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from hydra_plugins.vlmlab_pool_launcher._cells import FINISHED, Cell, families, plan, unique
from hydra_plugins.vlmlab_pool_launcher._display import display
from hydra_plugins.vlmlab_pool_launcher._job import Site, ThisMachine
from hydra_plugins.vlmlab_pool_launcher._pool import Patience, Pool
from hydra_plugins.vlmlab_pool_launcher._slots import make_slots
from vlmlab.cli.data import check_sources
from vlmlab.cli.entry import FAILED, ConfigError, fail, said
from vlmlab.cli.rules.values import given_twice
from vlmlab.contracts.errors import UserError, listed
from vlmlab.contracts.terminal import tell
from vlmlab.runs.cells_csv import CellsCsv
from vlmlab.runs.names import override_key
from vlmlab.runs.origin import check_origin

NOT_PASSED_ON = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.mode", "hydra.run")


class SweepError(UserError):
    """Some cells did not finish."""


@dataclass
class CellReturn(JobReturn):
    """A cell's report to the sweeper, which raises for a cell that did not finish, without Hydra's own line."""

    @property
    def return_value(self) -> Any:
        """The cell's metrics.

        Raises:
            SweepError: it did not finish.
        """
        if self.status != JobStatus.COMPLETED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def untrained(cells: Sequence[Cell]) -> list[CellReturn]:
    """The report of cells that were composed and not to be trained."""
    return [
        CellReturn(overrides=cell.overrides, cfg=cell.cfg, status=JobStatus.COMPLETED, _return_value=None)
        for cell in cells
    ]


@dataclass(frozen=True)
class Options:
    """How a sweep is run.

    Attributes:
        slots: ``hydra.launcher.slots``.
        devices_per_cell: slots of a cell that takes all devices there are; None: all.
        patience: how long and how often a cell may try.
        record: finished cells of other folders and machines, which are not trained again.
        site: makes the place where cells run, for the sweep's folder; None: this machine.
    """

    slots: int | None = None
    devices_per_cell: int | None = None
    patience: Patience | None = None
    record: CellsCsv | None = None
    site: Callable[[Path], Site] | None = None


def run_sweep(
    config: DictConfig, loader: ConfigLoader, job_overrides: Sequence[Sequence[str]], first: int, options: Options
) -> list[CellReturn]:
    """Run what is not finished, write and print the table whatever happened.

    Args:
        config: the sweep's configuration.
        loader: composes the cells.
        job_overrides: of every cell, from the sweeper.
        first: number of the first cell.
        options: how it is run.
    """
    jobs = planned(config, loader, job_overrides, first)
    sweep, cells = folder_of(config), unique(jobs)
    left = [cell for cell in cells if not cell.settle_finished()]
    look_ahead(left)
    site = options.site(sweep) if options.site is not None else ThisMachine()
    places = places_for(cells, options)
    sweep.mkdir(parents=True, exist_ok=True)
    for cell in left:
        if not cell.settle_recorded(options.record):
            cell.announce()
    _report_notes(cells)
    _report_reach(cells)
    tell(f"sweep {sweep}: {len(cells)} cells, {len(places)} at a time; each writes <cell>/log.txt")
    start = start_command()
    with display(len(places)) as show:
        pool = Pool(places, lambda cell: [*start, *cell_arguments(config, cell)], options.patience, show, site)
        pool.run(cells)
        show(cells)
    table = settle(sweep, cells, options.record)
    if pool.signals:
        raise KeyboardInterrupt
    return _returns(sweep, jobs, cells, table)


def places_for(cells: Sequence[Cell], options: Options) -> list[str]:
    """The slots of a sweep: of this machine, or of a scheduler's queue, where a cell takes one."""
    for cell in cells:
        if options.devices_per_cell is not None and cell.devices == -1:
            cell.devices = options.devices_per_cell
    if options.site is None:
        return make_slots(cells, options.slots)
    for cell in cells:
        if cell.devices == -1:
            raise ConfigError(
                f"cell {cell.name} takes all devices there are, and a scheduler has to be asked for a number of them; "
                "set trainer.devices=<number>, or hydra.launcher.devices_per_cell=<number>"
            )
    return [""] * (options.slots or max(1, len(cells)))


def settle(sweep: Path, cells: Sequence[Cell], record: CellsCsv | None) -> bool:
    """After all cells have ended: add them to the record and print the table; whether there is one."""
    for cell in cells:
        cell.missing()
    if record is not None:
        record.add(cell.folder for cell in cells if cell.state == "done")
    return _table(sweep, cells)


def planned(config: DictConfig, loader: ConfigLoader, job_overrides: Sequence[Sequence[str]], first: int) -> list[Cell]:
    """The cells of a sweep, in the sweeper's order; arguments as for ``run_sweep``.

    Raises:
        ConfigError: one of them is impossible, or there is none.
    """
    refuse_at_once(config, job_overrides)
    return plan(config, loader, job_overrides, first, folder_of(config))


def folder_of(config: DictConfig) -> Path:
    """The folder of a sweep."""
    return Path(str(config.hydra.sweep.dir))


def look_ahead(cells: Sequence[Cell]) -> None:
    """Find what is wrong with the data and the first weights of any cell that is left, before the first one trains.

    Raises:
        ConfigError: it begins with the cell's name.
    """
    seen: list[Any] = []
    for cell in cells:
        config = cell.config or {}
        read = {key: config.get(key) for key in ("data", "recipe", "evaluation", "init_from")}
        if read in seen:
            continue
        seen.append(read)
        try:
            if not cell.folder.is_dir():  # one that has begun asks for itself
                check_origin(cell.folder, config.get("init_from"))
            check_sources(cell.cfg)
        except Exception as error:
            if (sentence := said(error)) is None:
                raise
            raise ConfigError(f"cell {cell.name}: {sentence}") from error


def _report_notes(cells: Sequence[Cell]) -> None:
    """Which finished cells are not as they would be if they were made now."""
    for note in dict.fromkeys(cell.note for cell in cells if cell.state == "done" and cell.note != FINISHED):
        names = [cell.name for cell in cells if cell.note == note]
        tell(f"note: {len(names)} finished cells ({', '.join(names[:3])}{', ...' if names[3:] else ''}): {note}")


def _report_reach(cells: Sequence[Cell]) -> None:
    """Before anything trains: that no comparison of these cells can be significant, where that is so."""
    seeds = families(cells)
    if len(seeds) > 1:
        from vlmlab.analyse.stats import beyond_reach  # numpy

        if (sentence := beyond_reach(max(seeds.values()), len(seeds) - 1)) is not None:
            tell(f"note: {sentence}")


def refuse_at_once(config: DictConfig, job_overrides: Sequence[Sequence[str]]) -> None:
    """Refuse a sweep without cells, or with one key on several words.

    Raises:
        ConfigError: naming the word.
    """
    words = [str(word) for word in config.hydra.overrides.task]
    for sentence in given_twice(words):
        raise ConfigError(sentence)
    if not job_overrides:
        empty = next((word for word in OverridesParser.create().parse_overrides(words) if _has_no_value(word)), None)
        raise ConfigError(f"{empty.input_line if empty else 'the sweep'} gives no value, so that nothing would run")


def _has_no_value(override: Override) -> bool:
    return override.is_discrete_sweep() and not [*override.sweep_iterator()]


def start_command() -> list[str]:
    """The command line this process was started with, without its arguments."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return [sys.executable, "-m", str(spec.name).removesuffix(".__main__")]
    return [sys.executable, str(Path(sys.argv[0]).resolve())]


def cell_arguments(config: DictConfig, cell: Cell) -> list[str]:
    """What turns the sweep's command into the single run of one cell."""
    name = config.hydra.job.config_name
    flags = [] if name is None else ["--config-name", str(name)]
    for source in config.hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", str(source.path)]
    kept = [str(o) for o in config.hydra.overrides.hydra if not override_key(str(o)).startswith(NOT_PASSED_ON)]
    folder = str(cell.folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*flags, *cell.overrides, *kept, f"hydra.run.dir='{folder}'", "hydra.mode=RUN"]


def _table(sweep: Path, cells: Sequence[Cell]) -> bool:
    """Print the table; a table that cannot be made is an error, and no reason to lose the sweep's own report."""
    try:
        from vlmlab.analyse.sweep import write_table

        failed = [(cell.folder, cell.overrides, cell.note) for cell in cells if cell.state == "failed"]
        tell(f"{write_table(sweep, failed)}  {_page(sweep)}")
    except Exception as error:
        fail(f"no table of {sweep}: {said(error) or f'{type(error).__name__}: {error}'}", FAILED)
        return False
    _log_to_wandb(sweep, cells)
    return True


def _page(sweep: Path) -> str:
    """Write the sweep's page; the table must come whatever becomes of it."""
    try:
        from vlmlab.evaluate.gallery import write_sweep_gallery

        return str(write_sweep_gallery(sweep))
    except Exception as error:
        return f"(no report: {said(error) or f'{type(error).__name__}: {error}'})"


def _returns(sweep: Path, jobs: Sequence[Cell], cells: Sequence[Cell], table: bool) -> list[CellReturn]:
    left = [cell for cell in cells if cell.state != "done"]
    failure: UserError | None = None
    if left:
        reasons = listed((f"{cell.name} ({cell.note or cell.state})" for cell in left), 130, "; ")
        failure = SweepError(
            f"{len(left)} of {len(cells)} cells did not finish: {reasons}; see <cell>/log.txt in {sweep}, "
            "the same command runs only these"
        )
    elif not table:
        failure = SweepError(f"all cells of {sweep} finished and their table could not be written")
    returns = []
    for cell in jobs:
        bad = cell.state != "done" or (failure is not None and not left)
        value = failure if bad else (cell.run.result() or {}).get("metrics")
        status = JobStatus.FAILED if bad else JobStatus.COMPLETED
        returns.append(CellReturn(overrides=cell.overrides, cfg=cell.cfg, status=status, _return_value=value))
    return returns


def _log_to_wandb(sweep: Path, cells: Sequence[Cell]) -> None:
    """With ``logger=wandb``, send the table and figure; what W&B refuses is said and costs nothing else."""
    logger: Any = next((cell.config.get("logger") for cell in cells if cell.config), None) or {}
    if logger.get("name") != "wandb":
        return
    try:
        from vlmlab.cli.wandb_sweep import log_sweep

        tell(log_sweep(sweep, logger))
    except Exception as error:
        tell(f"note: the table is not at W&B: {said(error) or f'{type(error).__name__}: {error}'}")

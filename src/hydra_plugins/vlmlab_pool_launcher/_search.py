"""A search: Optuna is asked for a cell whenever a slot is free, and told of each that has ended."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.config_loader import ConfigLoader
from hydra.utils import instantiate
from omegaconf import DictConfig

from hydra_plugins.vlmlab_pool_launcher._cells import Cell, plan
from hydra_plugins.vlmlab_pool_launcher._display import display
from hydra_plugins.vlmlab_pool_launcher._job import ThisMachine
from hydra_plugins.vlmlab_pool_launcher._pool import Pool
from hydra_plugins.vlmlab_pool_launcher._space import space_of, words_of
from hydra_plugins.vlmlab_pool_launcher._sweep import (
    Options,
    SweepError,
    cell_arguments,
    folder_of,
    look_ahead,
    places_for,
    settle,
    start_command,
)
from vlmlab.cli.entry import ConfigError
from vlmlab.contracts.errors import listed
from vlmlab.contracts.terminal import tell
from vlmlab.runs.files import read_rows

JOURNAL = "optuna.journal"
"""In the sweep's folder: all trials, from which a search goes on."""
STUDY = "vlmlab"
IMPOSSIBLE = "impossible"
"""What a trial's record has where its values cannot be together: why."""
PRUNED = "given up by hydra.sweeper.prune"
Direction = Literal["maximize", "minimize"]
MAXIMIZE: Direction = "maximize"
MINIMIZE: Direction = "minimize"
DIRECTIONS = (MAXIMIZE, MINIMIZE)
WORDS = "overrides"
"""What a trial's record has of its cell."""


@dataclass
class Goals:
    """What a search is after: names in ``result.json``, costs as ``cost/flops_sample``, each with its direction.

    Attributes:
        names: of the numbers; the first may be empty: the first score of the sweep's table.
        directions: ``maximize`` or ``minimize``, one a name.
    """

    names: list[str]
    directions: list[Direction]

    @classmethod
    def of(cls, maximize: Any, minimize: Any) -> Goals:
        """From the sweeper's keys, each a name or a list of names."""
        up, down = ([one] if isinstance(one, str) else list(one or []) for one in (maximize, minimize))
        if not up and not down:
            up = [""]
        directions: list[Direction] = [*(MAXIMIZE for _ in up), *(MINIMIZE for _ in down)]
        return cls([*up, *down], directions)

    def values(self, folder: Path) -> list[float]:
        """Of a finished cell.

        Raises:
            SweepError: it lacks one.
        """
        from vlmlab.analyse.results import read_run
        from vlmlab.analyse.sweep import main_metrics

        record = read_run(folder)
        known = record.metrics | {f"cost/{name}": value for name, value in record.cost.items()}
        names = [name or next(iter(main_metrics([record])), "") for name in self.names]
        for name in names:
            if name not in known:
                some = [other for other in known if "/count" not in other]
                raise SweepError(f"{folder} has no {name or 'score'}; search by one of {listed(some)}")
        return [known[name] for name in names]


@dataclass
class Search:
    """What ``hydra.sweeper`` says, see `OptunaSweeperConf`.

    Attributes:
        words: the swept and the fixed overrides.
        trials: cells in all.
        goals: what is searched for.
        sampler: a node of Optuna's, with ``_target_``.
        pruner: likewise.
        prune: number of ``metrics.jsonl`` by which a cell is given up; None: none is.
        prune_direction: ``minimize`` where less of that number is better.
        seed: of the sampler.
    """

    words: list[str]
    trials: int
    goals: Goals
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any]
    prune: str | None = None
    prune_direction: str = MINIMIZE
    seed: int = 0

    def check(self) -> None:
        """Refuse what no search can be.

        Raises:
            ConfigError: in one sentence.
        """
        if self.trials < 1:
            raise ConfigError(f"hydra.sweeper.trials={self.trials} searches nothing; give at least 1")
        if self.prune_direction not in DIRECTIONS:
            raise ConfigError(
                f"hydra.sweeper.prune_direction={self.prune_direction} is none; give minimize or maximize"
            )
        if self.prune is not None and len(self.goals.names) > 1:
            raise ConfigError("hydra.sweeper.prune gives cells up by one number; leave it out, or search by one goal")


def run_search(config: DictConfig, loader: ConfigLoader, search: Search, options: Options) -> None:
    """Run a search, write and print its table and its best cells.

    Args:
        config: the sweep's configuration.
        loader: composes the cells.
        search: what is searched.
        options: how its cells are run.

    Raises:
        ConfigError: Optuna is not there, or the search is impossible.
        SweepError: some cells did not finish, or the journal is of another search.
        KeyboardInterrupt: a signal stopped it; cells were told and waited for.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweep=optuna needs optuna; pip install 'vlmlab[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    search.check()
    if options.site is not None and options.slots is None:
        raise ConfigError(
            "a search on a scheduler has to know how many cells run at a time; give hydra.launcher.slots="
        )
    asking = TrialQueue(config, loader, search, options)
    places = places_for(asking.tried(), options)
    asking.places, sweep = len(places), asking.sweep
    sweep.mkdir(parents=True, exist_ok=True)
    asking.study = _study(sweep, search)
    site = options.site(sweep) if options.site is not None else ThisMachine()
    tell(f"search {sweep}: {search.trials} cells, {len(places)} at a time; each writes <cell>/log.txt")
    start = start_command()
    with display(len(places)) as show:
        pool = Pool(places, lambda cell: [*start, *cell_arguments(config, cell)], options.patience, show, site)
        pool.run([], asking)
        show(asking.cells)
    table = settle(sweep, asking.cells, options.record)
    tell(best_of(asking.study, search.goals))
    if pool.signals:
        raise KeyboardInterrupt
    left = [cell.name for cell in asking.cells if cell.state == "failed" and not cell.given_up]
    if left:
        raise SweepError(
            f"{len(left)} cells of the search failed: {listed(left)}; see <cell>/log.txt in {sweep}, the same command "
            "tries them again"
        )
    if not table:
        raise SweepError(f"all cells of {sweep} finished and their table could not be written")


def _study(sweep: Path, search: Search) -> Any:
    """The study in the sweep's folder, new or to go on with."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(sweep / JOURNAL)))
    known = next((one for one in optuna.get_all_study_summaries(storage) if one.study_name == STUDY), None)
    wanted = [search.goals.names, search.goals.directions]
    if known is not None and (said := known.user_attrs.get("goals", wanted)) != wanted:
        raise SweepError(
            f"{sweep / JOURNAL} is of a search for {listed(name or 'the score' for name in said[0])}; "
            "give name=<another>, or the same goals"
        )
    begun = known.n_trials if known is not None else 0
    study = optuna.create_study(
        storage=storage,
        study_name=STUDY,
        sampler=instantiate(dict(search.sampler), seed=search.seed + begun),  # goes on, and not with the same values
        pruner=instantiate(dict(search.pruner)) if search.prune is not None else optuna.pruners.NopPruner(),
        directions=list(search.goals.directions),
        load_if_exists=True,
    )
    study.set_user_attr("goals", wanted)
    return study


class TrialQueue:
    """Gives the pool its cells: those of trials that were begun, then new ones as long as there are slots.

    Args:
        config: the sweep's configuration.
        loader: composes the cells.
        search: what is searched.
        options: how its cells are run.

    Attributes:
        study: Optuna's.
        places: slots that there are.
        cells: all so far.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader, search: Search, options: Options) -> None:
        self.config, self.loader, self.search, self.options = config, loader, search, options
        self.space, self.fixed = space_of(search.words, loader)
        self.sweep = folder_of(config)
        self.study: Any = None
        self.places = 0
        self.cells: list[Cell] = []
        self._open: dict[int, tuple[Any, Cell]] = {}
        self._seen: dict[int, int] = {}
        self._over = 0
        self._resumed = False

    def tried(self) -> list[Cell]:
        """Each choice composed once, with the first values of the others; nothing has begun then.

        Raises:
            ConfigError: one of them is impossible, or its data cannot be read.
        """
        first = {key: _first(one) for key, one in self.space.items()}
        tried = [first]
        for key, one in self.space.items():
            tried += [first | {key: choice} for choice in list(getattr(one, "choices", ()))[1:]]
        found = [self._cell(words_of(params), place) for place, params in enumerate(tried)]
        look_ahead(found)
        evaluation = (found[0].config or {}).get("evaluation")
        if self.search.prune not in (None, "loss") and evaluation and evaluation.get("every") is None:
            raise ConfigError(
                f"hydra.sweeper.prune={self.search.prune} is known only where training looks at held-out samples; "
                "set evaluation.every=<steps>"
            )
        return found

    def __call__(self, free: int) -> list[Cell]:
        """All cells by now; new ones for as many free slots."""
        if not self._resumed:
            self._resume()
        self._settle()
        begun = 0
        while begun < free and self._left() > 0:
            begun += self._begin()
        return self.cells

    def _left(self) -> int:
        """Cells that are still to be begun: all but those that have been, of which those that failed count once."""
        from optuna.trial import TrialState

        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return self.search.trials - self._over - len(self.study.get_trials(deepcopy=False, states=counted))

    def _resume(self) -> None:
        """Cells that an earlier call has begun and not ended go on; those that failed are tried again."""
        import optuna
        from optuna.trial import TrialState

        self._resumed = True
        known = [trial for trial in self.study.get_trials(deepcopy=False) if WORDS in trial.user_attrs]
        failed: dict[tuple[str, ...], Any] = {}
        for trial in known:
            words = tuple(trial.user_attrs[WORDS])
            if trial.state == TrialState.FAIL:
                failed[words] = trial
                self._over += IMPOSSIBLE in trial.user_attrs
                continue
            failed.pop(words, None)
            cell = self._cell(words, trial.number)
            if trial.state == TrialState.RUNNING:
                self._add(optuna.trial.Trial(self.study, trial._trial_id), cell)
            elif cell not in self.cells:
                self._show(cell, trial.state == TrialState.PRUNED)
        for trial in failed.values():
            if IMPOSSIBLE not in trial.user_attrs:
                self.study.enqueue_trial(trial.params, skip_if_exists=False)

    def _show(self, cell: Cell, pruned: bool) -> None:
        """A cell of a trial that is over, for the table and the display."""
        if pruned:
            cell.state, cell.note, cell.given_up = "failed", PRUNED, True
        elif not cell.settle_finished():
            cell.state, cell.note = "failed", f"{cell.folder} has been removed"
        self.cells.append(cell)

    def _begin(self) -> int:
        """Ask for one cell; whether it takes a slot."""
        from optuna.trial import TrialState

        trial = self.study.ask(self.space)
        words = words_of(trial.params)
        trial.set_user_attr(WORDS, words)
        try:
            return self._add(trial, self._cell(words, trial.number))
        except ConfigError as error:  # each choice is possible, and these together are not
            trial.set_user_attr(IMPOSSIBLE, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            self._over += 1
            tell(f"note: {' '.join(words)} is left out: {error}")
            return 0

    def _add(self, trial: Any, cell: Cell) -> int:
        """A trial's cell; one that is there already, finished or in flight, is not run again."""
        if cell not in self.cells:
            if not cell.settle_finished() and not cell.settle_recorded(self.options.record):
                cell.announce()
            self.cells.append(cell)
        self._open[trial.number] = (trial, cell)
        self._settle()
        return int(cell.state == "waiting")

    def _cell(self, words: Sequence[str], number: int) -> Cell:
        """The cell of these values: the one that there is, or a new one."""
        (cell,) = plan(self.config, self.loader, [[*self.fixed, *words]], number, self.sweep)
        if cell.devices == -1 and self.places:
            cell.devices = self.options.devices_per_cell or self.places
        known = (other for other in self.cells if other.config is not None and other.config == cell.config)
        return next(known, cell)

    def _settle(self) -> None:
        """Tell the study what has ended, and what it needs to know of what runs."""
        from optuna.trial import TrialState

        for number, (trial, cell) in list(self._open.items()):
            if cell.state == "running" and self.search.prune is not None:
                self._report(trial, cell)
            if cell.state not in ("done", "failed"):
                continue
            del self._open[number]
            if cell.state == "done":
                self.study.tell(number, self.search.goals.values(cell.folder), skip_if_finished=True)
            else:
                state = TrialState.PRUNED if cell.given_up else TrialState.FAIL
                self.study.tell(number, state=state, skip_if_finished=True)
                self._over += not cell.given_up

    def _report(self, trial: Any, cell: Cell) -> None:
        """Report what a cell's looks have found, and stop it where others were better by then."""
        from vlmlab.analyse.steps import seen

        assert self.search.prune is not None
        sign = 1 if self.search.prune_direction == self.search.goals.directions[0] else -1  # Optuna knows one direction
        looks = list(seen(read_rows(cell.folder / "metrics.jsonl"), self.search.prune))
        new = looks[self._seen.get(trial.number, 0) :]
        self._seen[trial.number] = len(looks)
        for look in new:
            trial.report(sign * look.value, int(look.step))
        if new and not cell.given_up and trial.should_prune() and cell.process is not None:
            cell.given_up = True
            cell.note = f"{PRUNED}={self.search.prune} at step {new[-1].step:.0f}"
            cell.process.send(signal.SIGTERM)


def _first(distribution: Any) -> Any:
    choices = getattr(distribution, "choices", None)
    return choices[0] if choices else distribution.low


def best_of(study: Any, goals: Goals) -> str:
    """The best cell, or the Pareto front of several goals, in words."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return "no cell of the search has finished"
    names = [name or "score" for name in goals.names]
    sign = -1 if goals.directions[0] == MAXIMIZE else 1
    ranked = sorted(study.best_trials, key=lambda trial: sign * trial.values[0])
    found = list({tuple(trial.user_attrs[WORDS]): trial for trial in ranked}.items())[: None if names[1:] else 1]
    title = f"Pareto front, {len(found)} of {len(done)} cells" if names[1:] else "best cell"
    told = [
        f"  {' '.join(words)}: "
        + ", ".join(f"{name} {value:.6g}" for name, value in zip(names, trial.values, strict=True))
        for words, trial in found
    ]
    return "\n".join([f"{title}:", *told])

"""The cells of a sweep: their names, folders and overrides, and how each of them is doing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.vlmlab_pool_launcher._composer import Composer
from vlmlab.cli import rules
from vlmlab.cli.entry import IN_USE, ConfigError
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.faults import machine_error, unusable
from vlmlab.contracts.stops import STOPS
from vlmlab.runs.cells_csv import CellsCsv
from vlmlab.runs.data import note_changed
from vlmlab.runs.files import write_json
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.identity import training_hash, weights_hash
from vlmlab.runs.names import HOW, SEED, cell_name, override_key, short_hash
from vlmlab.runs.origin import changed_origin
from vlmlab.runs.shared import KEY, unshared

ELSEWHERE = "another process is in its folder"
"""Note of a cell that waits for the process that has locked its folder."""
FINISHED = "finished before"
"""Note of a cell that is as it would be if it were made now."""

NO_RESULT = "no result: debug"
"""Note of a cell that was to have none."""

State = Literal["waiting", "running", "done", "failed", "interrupted"]


class Job(Protocol):
    """A cell that was started."""

    def waits(self) -> str:
        """What it waits for in words, before it has begun; empty from then on."""

    def poll(self) -> int | None:
        """The exit code of the cell, below zero for a signal; None while it runs."""

    def send(self, number: int) -> None:
        """Hand a signal to the cell, which then saves and ends; one that has not begun never does."""

    def kill(self) -> None:
        """End the cell at once with all that it has started; nothing where it has ended."""


@dataclass
class Cell:
    """One composition of a sweep.

    Attributes:
        name: the folder below the sweep's.
        folder: where it runs.
        overrides: its task overrides.
        swept: key -> value of those that differ between cells.
        cfg: the composed configuration with the ``hydra`` node.
        config: the plain configuration; None where it cannot be resolved (its process will say why).
        devices: slots it needs; -1: all there are.
        nodes: machines that it runs on, each with so many devices.
        accelerator: ``trainer.accelerator``.
        fresh: whether it trains again though it has finished.
        state: how it is doing.
        note: a few words beside the state: why it failed, that it was there already.
        process: of a started cell, wherever it runs.
        slots: held while it runs.
        started: ``time.monotonic`` of its start.
        seconds: it has run for.
        tries: how often it was tried again.
        not_before: ``time.monotonic`` before which it does not start again.
        stalled: that it makes no progress, in words; empty where it does.
        given_up: a search has stopped it, since others were better.
    """

    name: str
    folder: Path
    overrides: list[str]
    swept: dict[str, str]
    cfg: DictConfig
    config: dict[str, Any] | None = None
    devices: int = 1
    nodes: int = 1
    accelerator: str = "auto"
    fresh: bool = False
    state: State = "waiting"
    note: str = ""
    process: Job | None = None
    slots: list[str] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    tries: int = 0
    not_before: float = 0.0
    stalled: str = ""
    given_up: bool = False

    @property
    def run(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.folder)

    @contextmanager
    def own_fault(self) -> Iterator[None]:
        """What the disk refuses of its folder is this cell's failure alone."""
        try:
            yield
        except OSError as error:
            self.state, self.note = "failed", self._refused(error)

    def announce(self) -> None:
        """Make its folder with ``overrides.json``, from which the table knows the cell whatever becomes of it."""
        with self.own_fault():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "overrides.json", self.overrides)

    def settle_finished(self) -> bool:
        """Whether a result of this very configuration is there already; then the cell is done.

        The table knows a cell by its overrides: those of the present command take the place of earlier ones that made
        the same configuration, such as one without a key that now is swept.
        """
        if self.fresh or self.config is None:
            return False
        try:
            if not self.run.holds(self.config):
                return False
        except (UserError, OSError):  # its own process says so, or its beginning
            return False
        if changed_origin(self.folder, self.config.get("init_from")) is not None:
            return False  # its own process says so
        told = ["made by other code"] if self.run.by_other_code() else []
        told += [data] if (data := note_changed(self.run, OmegaConf.create(self.config))) else []
        self.state, self.note = "done", "; ".join(told) or FINISHED
        if read_texts(self.folder / "overrides.json") != self.overrides:
            self.announce()
        return True

    def settle_recorded(self, record: CellsCsv | None) -> bool:
        """Whether the sweep's record has this very cell; then its result is in its folder and the cell is done."""
        if self.fresh or self.config is None or record is None:
            return False
        try:
            note = record.restore(self.folder, self.config, self.overrides)
        except (UserError, OSError):  # its own process says so, or its beginning
            return False
        if not note:
            return False
        self.state, self.note = "done", note
        self.announce()
        return True

    def settle_ended(self, code: int, stopping: bool) -> None:
        """Record how its process ended."""
        self.seconds = time.monotonic() - self.started
        with self.own_fault():
            self._settle(code, stopping)

    def missing(self) -> bool:
        """Whether it is done and its result has been removed since; then it is not done any more."""
        if self.state != "done" or self.note == NO_RESULT or (self.folder / "result.json").is_file():
            return False
        self.state, self.note = "failed", f"{self.folder} has been removed"
        return True

    def _settle(self, code: int, stopping: bool) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its folder is gone", str(self.folder))
        state = self.run.state()
        finished = (self.folder / "result.json").is_file()
        if code == IN_USE:  # another launcher was there first, and the folder's files are its cell's
            self.state, self.note = "waiting", ELSEWHERE
            return
        if code == 0 and (finished or state.get("state") == "done"):
            self.state, self.note = "done", "" if finished else NO_RESULT
            return
        stopped = stopping and (code - 128 in STOPS or -code in STOPS)
        self.state = "interrupted" if stopped else "failed"
        self.note = self.note or ("" if stopped else self._reason(code))
        if not finished and state.get("state") != "failed":  # a killed process could not say so itself
            self.run.end(self.state, self.note or None)

    def _refused(self, error: OSError) -> str:
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            return f"{self.folder} is a file or a link that leads nowhere, not a folder; remove it"
        return str(machine_error(error) or unusable(error, self.folder) or error)

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"killed ({code})"
        lines = _tail(self.folder / "log.txt")
        sentence = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        if sentence:
            return sentence.removeprefix("error: ")
        if code == 0:
            return "ended without a result"
        return f"exit code {code}: {lines[-1]}" if lines else f"exit code {code}"


def read_texts(file: Path) -> list[str] | None:
    """A JSON list of texts, or None where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [str(item) for item in found] if isinstance(found, list) else None


def _tail(log: Path, characters: int = 20_000) -> list[str]:
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - characters))
        text = file.read().decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def plan(
    config: DictConfig, loader: ConfigLoader, job_overrides: Sequence[Sequence[str]], first: int, sweep: Path
) -> list[Cell]:
    """The cells of a sweep, in the sweeper's order, under different names; one cell for values that are the same.

    A cell is what its configuration says: neither its place among the others nor the words that made it count, so that
    a sweep that has grown finds its cells again.

    Raises:
        ConfigError: one of them is impossible; nothing has begun then.
    """
    cells = compose_cells(config, loader, job_overrides, first, sweep)
    own = unique(cells)
    adopt(own, sweep)
    refuse_other_trainings(own)
    refuse_training_twice(own)
    return cells


def compose_cells(
    config: DictConfig,
    loader: ConfigLoader,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    sweep: Path,
    beside: Any = None,
) -> list[Cell]:
    """The same without a look at what is in the sweep's folder.

    Args:
        config: the sweep's configuration.
        loader: composes the cells.
        job_overrides: of every cell, from the sweeper.
        first: number of the first cell.
        sweep: the sweep's folder.
        beside: what of the schema has the keys that a verb has beside those of a run.
    """
    given = as_printed(map(str, config.hydra.overrides.task))
    made: list[Cell] = []
    for overrides in job_overrides:
        task = [o for o in map(str, overrides) if not override_key(o).startswith(("hydra.", "hydra/")) and not _how(o)]
        swept = [o for o in task if o not in given]
        name = cell_name(swept)
        if any(cell.name == name for cell in made):
            name = f"{name[:90]}-{short_hash(' '.join(swept))}"
        made.append(Cell(name, sweep / name, task, dict(_pair(override) for override in swept), config))
    composer = Composer(config, loader)
    for place in news_first(made):
        _compose(composer, list(map(str, job_overrides[place])), first + place, made[place], beside)
    cells: list[Cell] = []
    for cell in made:
        cells.append(next((other for other in cells if other.config == cell.config), cell))
    return cells


def _how(override: str) -> bool:
    """Whether a word says by what a sweep is run, which is not part of a cell."""
    return override_key(override) == HOW


def news_first(cells: Sequence[Cell]) -> list[int]:
    """The places of all cells, first of those with a value that none before has: a wrong one is found among them."""
    seen: set[tuple[str, str]] = set()
    new: list[int] = []
    others: list[int] = []
    for place, cell in enumerate(cells):
        values = set(cell.swept.items())
        (others if place and values <= seen else new).append(place)
        seen |= values
    return new + others


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """Each cell once, in their order."""
    return list({id(cell): cell for cell in cells}.values())


def as_printed(words: Iterable[str]) -> set[str]:
    """The words that are not sweeps as Hydra's sweeper prints them: ``1e-3`` as ``0.001``, ``[1, 2]`` as ``[1,2]``."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    return {f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in parsed if not o.is_sweep_override()}


def refuse_other_trainings(cells: Sequence[Cell]) -> None:
    """Refuse a sweep whose folder has another training where one of its cells would be; nothing has begun then.

    Raises:
        ConfigError: naming the folder and the keys that differ.
    """
    for cell in cells:
        if cell.config is None or cell.fresh:
            continue
        sentence = None
        with contextlib.suppress(UserError, OSError):  # a damaged folder is its own cell's matter
            sentence = cell.run.refuses(cell.config)
        if sentence is not None:
            raise ConfigError(sentence)


def families(cells: Sequence[Cell]) -> dict[tuple[str, ...], int]:
    """The compositions of a sweep, by the values that are swept but for the seed, and their numbers of seeds."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.swept if key != SEED))
    return dict(Counter(tuple(cell.swept.get(key, "") for key in keys) for cell in cells))


def adopt(cells: Sequence[Cell], sweep: Path) -> None:
    """Give cells that have no folder yet that of the same training under another name.

    A key that had one value and now has several enters the names of the cells, whose trainings are what they were.
    """
    left = [cell for cell in cells if cell.config is not None and not (cell.folder / "config.yaml").is_file()]
    if not left or not sweep.is_dir():
        return
    taken = {cell.folder.name for cell in cells}
    others = [path for path in sorted(sweep.iterdir()) if path.name not in taken and ".old-" not in path.name]
    trainings = {str(RunFolder(path).env().get("training")): path for path in others}
    for cell in left:
        assert cell.config is not None
        there = trainings.get(training_hash(cell.config))
        if there is not None:
            cell.name, cell.folder = there.name, there


def refuse_training_twice(cells: Sequence[Cell]) -> None:
    """Cells that differ in nothing but their evaluation share their stages, or the sweep does not begin.

    Raises:
        ConfigError: they cannot, and no key says that each is to train by itself.
    """
    first: dict[str, Cell] = {}
    for cell in cells:
        config = cell.config or {}
        reason = (unshared(config) or _mixed(config)) if config.get(KEY) else ""
        if not reason or config.get("seed") is None:
            continue
        other = first.setdefault(weights_hash(config), cell)
        if other is not cell:
            raise ConfigError(
                f"the cells {other.name} and {cell.name} are one training, which would be made twice ({reason}); do "
                f"not sweep what only scores it, or have each train by {KEY}=false"
            )


def _mixed(config: Mapping[str, Any]) -> str:
    """Which stage is not shared because another run is mixed into it."""
    mixed = (name for name, stage in config["recipe"]["stages"].items() if stage.get("mix"))
    return next((f"recipe.stages.{name} is mixed with another run" for name in mixed), "")


def _pair(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _compose(composer: Composer, overrides: list[str], index: int, cell: Cell, beside: Any = None) -> None:
    cfg = composer.composed(overrides)
    with open_dict(cfg):
        cfg.hydra.job.id = str(index)
        cfg.hydra.job.num = index
    cell.cfg = cfg
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)  # values may refer to ${hydra:...}
    try:
        values = rules.admitted(cfg, cfg.hydra, beside)
    finally:
        HydraConfig.instance().cfg = before
    trainer = values.get("trainer") or {}
    devices = trainer.get("devices", 1)
    cell.devices = devices if isinstance(devices, int) else 1
    cell.nodes = int(trainer.get("nodes") or 1)
    cell.accelerator = str(trainer.get("accelerator", "auto"))
    cell.fresh = bool(values.get("fresh", False))
    cell.config = values

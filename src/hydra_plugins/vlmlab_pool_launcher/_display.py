"""How the cells are doing: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from omegaconf import OmegaConf

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from vlmlab.contracts.terminal import tell, visible
from vlmlab.recipe.stage import scaled_steps
from vlmlab.runs.progress import duration, losses

if TYPE_CHECKING:
    from rich.table import Table as RichTable

REFRESH_S = 1.0


@dataclass
class Pace:
    """How fast a running cell is, from two looks at its steps.

    Attributes:
        done: optimizer steps over all stages when it was first seen.
        since: ``time.monotonic`` of that.
    """

    done: int
    since: float

    def seconds_left(self, done: int, steps: int, now: float) -> float | None:
        """Seconds until the last step of the last stage; None before anything has moved."""
        if done <= self.done:
            return None
        return (now - self.since) / (done - self.done) * (steps - done)


@dataclass
class Watcher:
    """What the display knows of the cells beside their states.

    Attributes:
        slots: cells at a time.
        paces: by the cell's name.
        scores: of finished cells, read once.
    """

    slots: int
    paces: dict[str, Pace] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)

    def seconds_left(self, cell: Cell, now: float) -> float | None:
        """Time until a running cell has trained; None where it is not known yet."""
        known = steps_of(cell) if cell.state == "running" else None
        if known is None:
            return None
        pace = self.paces.setdefault(cell.name, Pace(known[0], now))
        return pace.seconds_left(*known, now)

    def all_left(self, cells: Sequence[Cell], now: float) -> float | None:
        """Time until the last cell has ended, if those that wait take as long as those that ran; None if not known."""
        left = [self.seconds_left(cell, now) for cell in cells if cell.state == "running"]
        taken = [cell.seconds for cell in cells if cell.state == "done" and cell.seconds]
        taken += [cell.seconds + more for cell in cells if (more := self.seconds_left(cell, now)) is not None]
        waiting = sum(cell.state == "waiting" for cell in cells)
        if (waiting and not taken) or None in left or not (waiting or left):
            return None
        known = [one for one in left if one is not None]
        whole = sum(known) + (waiting * sum(taken) / len(taken) if waiting else 0.0)
        return max([whole / max(1, min(self.slots, waiting + len(left))), *known])

    def score(self, cell: Cell) -> str:
        """The first score of a finished cell."""
        if cell.state != "done":
            return ""
        if cell.name not in self.scores:
            from vlmlab.analyse.results import read_run
            from vlmlab.analyse.sweep import main_metrics  # numpy

            record = read_run(cell.folder)
            names = main_metrics([record])
            self.scores[cell.name] = f"{record.metrics[names[0]]:.3f}" if names else ""
        return self.scores[cell.name]


def progress(cell: Cell) -> str:
    """Where a running cell is (``align 120/300``), or the note of another."""
    if cell.state != "running":
        return cell.note
    if cell.process is not None and (queue := cell.process.waits()):
        return queue
    state = cell.run.state()
    if state.get("state") == "done":
        return "writing its report"
    step, steps = state.get("step"), state.get("steps")
    place = "" if step is None else f" {step}" + (f"/{steps}" if steps else "")
    return f"{state.get('stage') or 'starting'}{place}{f', {cell.stalled}' if cell.stalled else ''}"


def state_of(cell: Cell) -> str:
    """Its state in a word: one that a scheduler has queued waits."""
    return "waiting" if cell.process is not None and cell.state == "running" and cell.process.waits() else cell.state


def steps_of(cell: Cell) -> tuple[int, int] | None:
    """Optimizer steps of a cell so far and in all, over its stages, as its budget has them; None before the first."""
    state, config = cell.run.state(), cell.config or {}
    stages: dict[str, Any] = (config.get("recipe") or {}).get("stages") or {}
    if state.get("stage") not in stages:
        return None
    budget = OmegaConf.create({"budget": config.get("budget") or {}})
    sizes = {name: scaled_steps(int((stage or {}).get("steps") or 0), budget) for name, stage in stages.items()}
    before = list(sizes)[: list(sizes).index(str(state["stage"]))]
    return sum(sizes[name] for name in before) + int(state.get("step") or 0), sum(sizes.values())


class Lines:
    """One line whenever a cell changes its state or its stage.

    Args:
        slots: cells at a time.
    """

    def __init__(self, slots: int) -> None:
        self._last: dict[str, tuple[str, str]] = {}
        self._watcher = Watcher(slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, cells: Sequence[Cell]) -> None:
        """Print what changed."""
        now = time.monotonic()
        for cell in cells:
            self._watcher.seconds_left(cell, now)
            words = progress(cell)
            change = (state_of(cell), re.sub(r" \d+(/\d+)?", "", words) if cell.state == "running" else words)
            if change != self._last.get(cell.name):
                self._last[cell.name] = change
                over = sum(other.state in ("done", "failed", "interrupted") for other in cells)
                said = " ".join(filter(None, [state_of(cell), words, self._more(cell, cells, now)]))
                tell(f"[{over}/{len(cells)}] {cell.name}: {said}")

    def _more(self, cell: Cell, cells: Sequence[Cell], now: float) -> str:
        """The score of a finished cell, the loss of a running one, and the time that all of them need."""
        score, loss = self._watcher.score(cell), losses(cell.folder) if cell.state == "running" else ""
        left = duration(self._watcher.all_left(cells, now))
        more = [f"score {score}" if score else "", f"loss {loss}" if loss else "", f"about {left} left" if left else ""]
        return f"({', '.join(filter(None, more))})" if any(more) else ""


class Table:
    """A table that is drawn again and again.

    Args:
        slots: cells at a time.
    """

    def __init__(self, slots: int) -> None:
        from rich.live import Live

        self._live = Live(auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._watcher = Watcher(slots)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, cells: Sequence[Cell]) -> None:
        """Draw all cells, at most once a second."""
        if time.monotonic() - self._drawn < REFRESH_S and any(c.state in ("waiting", "running") for c in cells):
            return
        self._drawn = time.monotonic()
        self._live.update(drawn(cells, self._watcher, self._drawn), refresh=True)


def drawn(cells: Sequence[Cell], watcher: Watcher, now: float) -> RichTable:
    """The table as it is now; at 80 columns names and places are broken and no heading is.

    Args:
        cells: of the sweep.
        watcher: keeps what was seen before.
        now: ``time.monotonic``.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    states = [state_of(cell) for cell in cells]
    left = duration(watcher.all_left(cells, now))
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    table = RichTable(box=None, pad_edge=False, caption=f"{counted}{f'; about {left} left' if left else ''}")
    table.add_column("cell", overflow="fold", ratio=3)
    table.add_column("state", no_wrap=True, min_width=11)
    table.add_column("where", overflow="fold", ratio=2)
    for title, width in (("loss", 9), ("score", 5), ("spent", 6), ("left", 6)):
        table.add_column(title, no_wrap=True, min_width=width, justify="right")
    for cell in cells:
        spent = duration(cell.seconds) if cell.seconds else ""
        loss = losses(cell.folder) if cell.state in ("running", "failed", "interrupted") else ""
        more = duration(watcher.seconds_left(cell, now))
        table.add_row(cell.name, state_of(cell), Text(visible(progress(cell))), loss, watcher.score(cell), spent, more)
    return table


def display(slots: int) -> Lines | Table:
    """The table on a terminal, lines elsewhere, of cells of which so many run at a time."""
    return Table(slots) if sys.stdout.isatty() else Lines(slots)

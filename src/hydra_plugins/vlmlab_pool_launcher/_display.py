"""How the cells are doing: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from hydra_plugins.vlmlab_pool_launcher._cells import Cell
from vlmlab.contracts.terminal import tell, visible

REFRESH_S = 1.0


def progress(cell: Cell) -> str:
    """Where a running cell is (``align 120/300``), or the note of another."""
    if cell.state != "running":
        return cell.note
    state = cell.run.state()
    if state.get("state") == "done":
        return "writing its report"
    step, steps = state.get("step"), state.get("steps")
    place = "" if step is None else f" {step}" + (f"/{steps}" if steps else "")
    return f"{state.get('stage') or 'starting'}{place}"


class Lines:
    """One line whenever a cell changes its state or its stage."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, cells: Sequence[Cell]) -> None:
        """Print what changed."""
        for cell in cells:
            words = progress(cell)
            change = (cell.state, words.rpartition(" ")[0] if cell.state == "running" and " " in words else words)
            if change != self._last.get(cell.name):
                self._last[cell.name] = change
                over = sum(other.state in ("done", "failed", "interrupted") for other in cells)
                tell(f"[{over}/{len(cells)}] {cell.name}: {cell.state} {words}".rstrip())


class Table:
    """A table that is drawn again and again."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(auto_refresh=False, transient=True)
        self._drawn = 0.0

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
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable("cell", "state", "where", "seconds")
        for cell in cells:
            seconds = f"{cell.seconds:.0f}" if cell.seconds else ""
            table.add_row(cell.name, cell.state, Text(visible(progress(cell))), seconds)
        self._live.update(table, refresh=True)


def display() -> Lines | Table:
    """The table on a terminal, lines elsewhere."""
    return Table() if sys.stdout.isatty() else Lines()

"""What finished cells saw at held-out samples while they trained, beside the record of their results: ``looks.csv``.

With ``evaluation.every`` a run writes losses between its steps into ``metrics.jsonl``; here those rows of all cells of
a record are kept, so that curves and steps to a threshold can be computed without the run folders.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmlab.contracts.errors import UserError
from vlmlab.runs.files import write_atomic

NAME = "looks.csv"
"""Of the file, beside the record."""
BEFORE = "held_out/"
"""Before the name of every number that a look gives."""
IDENTITY = ("cell", "config", "stage", "step")
"""First columns: the cell's name, 16 hexadecimal digits of its configuration, and when it looked."""
DIGITS = 6
"""Of a loss, which no table shows."""

Look = dict[str, Any]


def looks_of(rows: Iterable[Mapping[str, Any]]) -> list[Look]:
    """The looks among the rows of ``metrics.jsonl``, and how many steps each stage had."""
    found = []
    for row in rows:
        numbers = {key: value for key, value in row.items() if key.startswith(BEFORE)}
        if numbers or row.get("finished"):
            found.append({"stage": row.get("stage"), "step": row.get("step"), **numbers})
    return found if any(len(look) > 2 for look in found) else []


def read_looks(path: Path) -> dict[str, list[Look]]:
    """Configuration of a cell to its looks, in order; none where there is no such file.

    Raises:
        UserError: a column that says whose a look is, or when, is missing, or a number is none.
    """
    found: dict[str, list[Look]] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in IDENTITY if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}; restore the file, or remove it")
        for number, row in enumerate(reader, 2):
            try:
                numbers = {key: float(value) for key, value in row.items() if key not in IDENTITY and value}
                look = {"stage": row["stage"], "step": int(row["step"]), **numbers}
            except (TypeError, ValueError):
                raise UserError(f"{path} line {number} has a number that is none; delete that line") from None
            found.setdefault(row["config"], []).append(look)
    return found


def write_looks(path: Path, names: Mapping[str, str], looks: Mapping[str, Iterable[Look]]) -> None:
    """Write the looks of the cells that have any; no file where none has.

    Args:
        path: the file.
        names: configuration to the cell's name, in the order of the record.
        looks: configuration to looks.
    """
    rows = [
        {"cell": name, "config": config, **{key: _shown(value) for key, value in look.items()}}
        for config, name in names.items()
        for look in looks.get(config, ())
    ]
    if not rows:
        return
    columns = [*IDENTITY, *sorted({key for row in rows for key in row} - set(IDENTITY))]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, out.getvalue())


def _shown(value: Any) -> Any:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else value

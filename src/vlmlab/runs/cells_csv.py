"""The committed record of a sweep: a CSV with one row a finished cell, from which a cell need not be trained again.

A row has what identifies its cell, then every number of its result. Run folders stay on the machine that made them;
this file is small enough to be committed, so that an experiment can grow over days and machines.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmlab.contracts.errors import UserError
from vlmlab.data.provenance import data_of
from vlmlab.runs.config import config_hash
from vlmlab.runs.environment import code_fingerprint
from vlmlab.runs.files import write_atomic
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.looks_csv import NAME as LOOKS
from vlmlab.runs.looks_csv import looks_of, read_looks, write_looks

IDENTITY = ("cell", "overrides", "config", "data", "code")
"""First columns: name of the folder, task overrides as JSON, and three hashes of 16 hexadecimal digits."""
COST = "cost."
"""Before the name of every number of ``cost``; the other columns are metrics."""
OTHER_CODE = "recorded, made by other code"
RECORDED = "recorded"
_MOVES_ALONG = "image_facts"
"""Times of image files differ between two copies of the same data; their names and the annotations do not."""

Row = dict[str, str]


def read_cells(path: Path) -> list[Row]:
    """The rows of a record, none where there is no such file.

    Raises:
        UserError: it lacks a column that identifies cells, or a row has too many or too few fields.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in IDENTITY if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{path} is not a record of cells: it has no column {missing[0]}; give "
                "hydra.launcher.record= another file"
            )
        rows = []
        for number, row in enumerate(reader, 2):
            if None in row or None in row.values():
                raise UserError(f"{path} line {number} has not as many fields as the first line; delete that line")
            rows.append(row)
    return rows


def metrics_of(row: Mapping[str, str]) -> dict[str, float]:
    """The metrics of a row; what a cell does not have is left out."""
    return {k: float(v) for k, v in row.items() if v and k not in IDENTITY and not k.startswith(COST)}


def cost_of(row: Mapping[str, str]) -> dict[str, float]:
    """The numbers of ``cost`` of a row."""
    return {k.removeprefix(COST): float(v) for k, v in row.items() if v and k.startswith(COST)}


def overrides_of(row: Mapping[str, str]) -> list[str]:
    """The task overrides of a row's cell."""
    return [str(word) for word in json.loads(row["overrides"])]


def data_hash(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a configuration's data: contents of annotations, names of images, what is generated."""
    return _digest(_without(data_of(OmegaConf.create(dict(config))), _MOVES_ALONG))


class CellsCsv:
    """A record that a sweep reads before it trains and adds to when its cells have ended.

    Args:
        path: the file; made when the first cell is added, and beside it what cells saw while they trained, if any did.

    Raises:
        UserError: see ``read_cells`` and ``read_looks``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = {row["config"]: row for row in read_cells(path)}
        self._looks = read_looks(path.with_name(LOOKS)) if self._rows else {}

    def restore(self, folder: Path, config: Mapping[str, Any], overrides: Iterable[str]) -> str:
        """Write the result of a recorded cell into its folder, which has none yet.

        Returns:
            What to say of it; empty where no row has this configuration and these data.
        """
        row = self._rows.get(config_hash(config))
        run = RunFolder(folder)
        if row is None or run.config() is not None or row["data"] != data_hash(config):
            return ""
        with run:
            run.open(config, list(overrides))
            run.update_env(code=row["code"], codes=[row["code"]])
            for look in self._looks.get(row["config"], ()):
                run.log(look)
            run.finish(metrics_of(row), cost_of(row), recorded=str(self.path))
        return RECORDED if row["code"] == code_fingerprint() else OTHER_CODE

    def add(self, folders: Iterable[Path]) -> None:
        """Add the finished cells of these folders, those that were restored left as they are, and write the file."""
        for folder in folders:
            run = RunFolder(folder)
            result, config = run.result(), run.config()
            if result is None or config is None or result.get("failed") or result.get("recorded"):
                continue
            row = _row(run, result, config)
            self._rows[row["config"]] = row
            self._looks[row["config"]] = looks_of(run.metrics())
        if self._rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = sorted(self._rows.values(), key=lambda row: row["cell"])
            write_looks(self.path.with_name(LOOKS), {row["config"]: row["cell"] for row in rows}, self._looks)
            write_atomic(self.path, _text(rows))


def _row(run: RunFolder, result: Mapping[str, Any], config: Mapping[str, Any]) -> Row:
    env = run.env()
    row = {
        "cell": run.path.name,
        "overrides": json.dumps([str(word) for word in result["overrides"]]),
        "config": config_hash(config),
        "data": _digest(_without(env.get("data", {}), _MOVES_ALONG)),
        "code": str(env.get("code", "")),
    }
    numbers = {f"{COST}{key}": value for key, value in result["cost"].items()} | dict(result["metrics"])
    return row | {key: repr(value) for key, value in numbers.items() if isinstance(value, int | float)}


def _text(rows: Collection[Row]) -> str:
    columns = dict.fromkeys([*IDENTITY, *(key for row in rows for key in row)])  # in the order of the first result
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _without(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(item, key) for name, item in value.items() if name != key}
    return [_without(item, key) for item in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

"""The runs of a comparison from wherever they are: a sweep's folder, a committed record, or an export of W&B's runs."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmlab.analyse.compare import Rows, rows_of
from vlmlab.analyse.results import RunRecord, numbers, read_record, read_sweep
from vlmlab.contracts.errors import UserError
from vlmlab.runs.cells_csv import IDENTITY, read_cells
from vlmlab.runs.config import leaves
from vlmlab.runs.looks_csv import NAME as LOOKS
from vlmlab.runs.looks_csv import read_looks
from vlmlab.runs.names import SEED

NAMED = ("name", "Name")
"""Columns of a W&B export that may have the runs' names."""


def read_results(path: Path) -> list[RunRecord]:
    """The runs of a sweep's folder, of a record (``cells.csv``), or of an export of W&B's runs (a CSV, `read_export`).

    Raises:
        UserError: there is no such file or folder, or it is none of these.
    """
    if path.is_dir():
        return read_sweep(path)
    if not path.is_file():
        raise UserError(f"{path} is not there; give the folder of a sweep, its cells.csv, or an export of W&B's runs")
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    if all(name in columns for name in IDENTITY):
        return read_record(path)
    return read_export(path)


def reader_of(path: Path) -> Rows:
    """What gives the rows that a run of `read_results` wrote while it trained; no rows where they are not known."""
    if path.is_dir():
        return rows_of
    looks = read_looks(path.with_name(LOOKS)) if path.is_file() else {}
    names = {row["cell"]: looks.get(row["config"], []) for row in read_cells(path)} if looks else {}
    return lambda record: names.get(record.folder.name, [])


def read_export(path: Path) -> list[RunRecord]:
    """The finished runs of a CSV with a row a run that W&B's mirror of a sweep was exported to.

    Either with the columns ``name``, ``config`` and ``summary`` (what a script over ``wandb.Api().runs(...)`` writes,
    the last two mappings), or with a column a number, as a table of runs is exported: names with a ``/`` are metrics,
    others in small letters keys of the configuration. What differs between the runs takes the place of a sweep's keys.
    W&B has no costs.

    Raises:
        UserError: it has no column with the runs' names, or a mapping is none.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    named = next((name for name in NAMED if rows and name in rows[0]), None)
    if named is None:
        raise UserError(f"{path} is neither a record of cells nor an export of W&B's runs: it has no column name")
    runs = [_nested(path, row) if {"config", "summary"} <= row.keys() else _flat(row) for row in rows]
    keys = _telling([config for config, _ in runs])
    return [
        RunRecord(
            Path(row[named]), "done", "", {key: _short(config[key]) for key in keys if key in config}, metrics, {}
        )
        for row, (config, metrics) in zip(rows, runs, strict=True)
        if metrics
    ]


def _nested(path: Path, row: Mapping[str, str]) -> tuple[dict[str, str], dict[str, float]]:
    config, summary = (_mapping(path, row, key) for key in ("config", "summary"))
    metrics = {key: value for key, value in numbers(summary).items() if _is_metric(key)}
    return {key: str(value) for key, value in leaves(config)}, metrics


def _mapping(path: Path, row: Mapping[str, str], key: str) -> dict[str, Any]:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(row[key])
        except (ValueError, SyntaxError, RecursionError):
            continue
        if isinstance(value, dict):
            return {str(name): item for name, item in value.items()}
    raise UserError(f"{path}: the {key} of a run is not a mapping; export it as JSON")


def _flat(row: Mapping[str, str]) -> tuple[dict[str, str], dict[str, float]]:
    metrics = {}
    for key, value in row.items():
        try:
            if _is_metric(key):
                metrics[key] = float(value)
        except (TypeError, ValueError):  # an empty place, or a word
            continue
    own = {key: value for key, value in row.items() if "/" not in key and key == key.lower()}  # Name, State are W&B's
    return own, metrics


def _is_metric(key: str) -> bool:
    """Whether a number is of ``result.json``, and none of the training's."""
    return "/" in key and not key.startswith(("train/", "_"))


def _telling(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that tell the runs apart: the seed, then of those that differ always together the shortest."""
    every = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in every if len({config.get(key) for config in configs}) > 1]
    chosen = [key for key in differing if key.endswith("._target_")]
    inside = tuple(key.removesuffix("_target_") for key in chosen)
    kept: dict[tuple[int, ...], str] = {}
    for key in sorted(differing, key=lambda key: (key != SEED, key.count("."), key)):
        if key in chosen or not key.startswith(inside or ("\0",)):
            kept.setdefault(_grouping(config.get(key) for config in configs), key)
    return list(kept.values())


def _grouping(values: Iterable[str | None]) -> tuple[int, ...]:
    """Which runs have the same value, whatever the values are."""
    known: dict[str | None, int] = {}
    return tuple(known.setdefault(value, len(known)) for value in values)


def _short(value: str) -> str:
    """A class by its name alone."""
    return value.rpartition(".")[2] if value.startswith("vlmlab.") else value

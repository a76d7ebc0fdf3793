"""The cells of a sweep, grouped where they differ in nothing but the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmlab.analyse.results import RunRecord
from vlmlab.analyse.stats import Interval, mean_interval
from vlmlab.runs.names import SEED


@dataclass(frozen=True)
class Combination:
    """The runs that differ in nothing but the seed.

    Attributes:
        values: value of every swept key as on the command line; ``-`` where the cell does not set it.
        records: all cells of this combination.
    """

    values: dict[str, str]
    records: list[RunRecord]

    @property
    def finished(self) -> list[RunRecord]:
        """The cells that have a result."""
        return [record for record in self.records if record.done]

    @property
    def label(self) -> str:
        """The values, for a figure."""
        return ", ".join(self.values.values()) or "all"

    @property
    def state(self) -> str:
        """``done``, or how many of the cells are in which state; ``*`` marks results made by other code or data."""
        mark = "*" if any(record.stale or record.other_data for record in self.records) else ""
        states = [record.state for record in self.records]
        if set(states) == {"done"}:
            return f"done{mark}"
        return ", ".join(f"{states.count(name)} {name}{mark if name == 'done' else ''}" for name in sorted(set(states)))

    def interval(self, metric: str) -> Interval | None:
        """Mean and interval of a metric over the finished cells that have it."""
        values = [record.metrics[metric] for record in self.finished if metric in record.metrics]
        return mean_interval(values) if values else None

    def cost(self, name: str) -> float | None:
        """Mean of a cost over the finished cells."""
        values = [record.cost[name] for record in self.finished if name in record.cost]
        return mean_interval(values).mean if values else None

    def of_seed(self, metric: str) -> dict[str, RunRecord]:
        """Seed to the finished cell that has the metric."""
        return {record.overrides.get(SEED, "0"): record for record in self.finished if metric in record.metrics}

    def by_seed(self, metric: str) -> dict[str, float]:
        """Seed to score."""
        return {seed: record.metrics[metric] for seed, record in self.of_seed(metric).items()}


def combinations(records: Sequence[RunRecord]) -> list[Combination]:
    """The cells of a sweep grouped by the keys that differ between them, without the seed."""
    keys = swept_keys(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(tuple(record.overrides.get(key, "-") for key in keys), []).append(record)
    return [
        Combination(dict(zip(keys, values, strict=True)), groups[values]) for values in sorted(groups, key=_natural)
    ]


def swept_keys(records: Sequence[RunRecord]) -> list[str]:
    """The overridden keys whose values differ between cells, in the order of the command line, without the seed."""
    keys = [key for key in dict.fromkeys(key for record in records for key in record.overrides) if key != SEED]
    return [key for key in keys if len({record.overrides.get(key) for record in records}) > 1]


def short_names(keys: Sequence[str]) -> list[str]:
    """The keys by as many of their last parts as tell them apart: ``align.steps`` of ``recipe.stages.align.steps``."""
    return [_short_name(key, [other for other in keys if other != key]) for key in keys]


def _short_name(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    ends = (".".join(parts[-size:]) for size in range(1, len(parts)))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), key)


def _natural(values: tuple[str, ...]) -> list[tuple[int, float, str]]:
    """Numbers by size, before words by alphabet."""
    keyed = []
    for value in values:
        try:
            keyed.append((0, float(value), value))
        except ValueError:
            keyed.append((1, 0.0, value))
    return keyed

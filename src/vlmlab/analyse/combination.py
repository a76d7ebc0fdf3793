"""The cells of a sweep that differ in nothing but the seed."""

from __future__ import annotations

from dataclasses import dataclass

from vlmlab.analyse.results import RunRecord
from vlmlab.analyse.stats import Interval, mean_interval

SEED = "seed"


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

    def by_seed(self, metric: str) -> dict[str, float]:
        """Seed to score."""
        scored = [record for record in self.finished if metric in record.metrics]
        return {record.overrides.get(SEED, "0"): record.metrics[metric] for record in scored}

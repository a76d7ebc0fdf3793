"""``vlmlab plan -m`` in words: how many seeds a claim needs, from pilot cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmlab.analyse.combination import Combination, combinations
from vlmlab.analyse.power import Spread, power_of, seeds_needed, smallest_effect, spread
from vlmlab.analyse.results import read_record, read_sweep
from vlmlab.analyse.stats import beyond_reach, counted, fewest_seeds
from vlmlab.analyse.sweep import main_metrics
from vlmlab.contracts.errors import UserError


@dataclass(frozen=True)
class Claim:
    """What a sweep is to show.

    Attributes:
        compositions: that it compares, the baseline among them.
        seeds: of each, as it was asked for.
        effect: the true difference to be found, in the metric's unit; None: none is named.
        power: chance to find it.
    """

    compositions: int
    seeds: int
    effect: float | None
    power: float

    @property
    def comparisons(self) -> int:
        """All compositions but the baseline."""
        return self.compositions - 1


def foretell(claim: Claim, pilot: Path | None = None, metric: str | None = None) -> list[str]:
    """What the seeds of a sweep can show, and how many its claim needs, in lines.

    Args:
        claim: what it is to show.
        pilot: folder of a sweep of like cells, or its record (``cells.csv``); None: only what holds whatever seeds vary
            by.
        metric: as in ``result.json``; None: the first of the pilot's table.

    Raises:
        UserError: the pilot has no finished cell with the metric, or too few seeds to vary.
    """
    if claim.comparisons < 1:
        raise UserError("one composition has nothing to be compared with; sweep a key besides seed, as in mask=a,b")
    total = claim.compositions * claim.seeds
    lines = [
        f"{claim.compositions} compositions with {counted(claim.seeds, 'seed')} each: {counted(total, 'cell')}, "
        f"{counted(claim.comparisons, 'comparison')} with one baseline"
    ]
    reach = beyond_reach(claim.seeds, claim.comparisons)
    lines.append(reach or f"{fewest_seeds(claim.comparisons)} seeds are the fewest with which any can be significant")
    if pilot is None:
        return [
            *lines,
            "how many seeds an effect needs is seen from pilot cells: give pilot=<folder of a sweep, or its cells.csv>",
        ]
    rows, name = _pilot(pilot, metric)
    known = spread([row.by_seed(name) for row in rows])
    if known is None:
        raise UserError(
            f"pilot={pilot} has no composition with two seeds and {name}, which would show what seeds vary by; "
            "train one with seed=0,1,2"
        )
    how = "differences of the same seed" if known.paired else "single scores, taken as independent"
    lines.append(
        f"pilot {pilot}, {name}: a difference has a standard deviation of {known.value:.3g} between seeds (from {how}; "
        f"with 80 % confidence at most {known.upper:.3g})"
    )
    return [*lines, *_of_effect(claim, known), *_cost(claim, known, rows)]


def _pilot(pilot: Path, metric: str | None) -> tuple[list[Combination], str]:
    """The pilot's compositions and the metric that is meant."""
    records = read_record(pilot) if pilot.is_file() else read_sweep(pilot)
    names = main_metrics(records)
    if not names:
        raise UserError(
            f"pilot={pilot} has no finished cells with a metric in common; give the folder of a sweep, or its cells.csv"
        )
    name = metric or names[0]
    rows = [row for row in combinations(records) if row.by_seed(name)]
    if not rows:
        raise UserError(f"no finished cell of pilot={pilot} has metric={name}; its table has {', '.join(names[:6])}")
    return rows, name


def _of_effect(claim: Claim, known: Spread) -> list[str]:
    """Seeds for the effect, or the effect for the seeds."""
    least = smallest_effect(claim.seeds, known.value, claim.power, claim.comparisons)
    with_these = (
        [] if least is None else [f"{counted(claim.seeds, 'seed')} find {least:.2g} with power {claim.power:g}"]
    )
    if claim.effect is None:
        return with_these
    needed, careful = (_needed(claim, deviation) for deviation in (known.value, known.upper))
    power = power_of(claim.seeds, claim.effect, known.value, claim.comparisons)
    return [
        f"a difference of {claim.effect:g} is found with power {claim.power:g} by {_seeds(needed)} "
        f"({_seeds(careful)} if seeds vary by {known.upper:.3g})",
        f"{counted(claim.seeds, 'seed')} find it with power {power:.2f}",
        *with_these,
    ]


def _needed(claim: Claim, deviation: float) -> int | None:
    return seeds_needed(claim.effect or 0.0, deviation, claim.power, claim.comparisons)


def _seeds(number: int | None) -> str:
    return "no number of seeds that could be trained" if number is None else counted(number, "seed")


def _cost(claim: Claim, known: Spread, rows: Sequence[Combination]) -> list[str]:
    """Training time of the seeds that are needed, at the pilot's mean."""
    seconds = [cost for row in rows if (cost := row.cost("seconds")) is not None]
    needed = _needed(claim, known.value) if claim.effect is not None else claim.seeds
    if not seconds or needed is None:
        return []
    hours = claim.compositions * needed * sum(seconds) / len(seconds) / 3600
    return [f"that is {claim.compositions * needed} cells, {hours:.3g} h of training at the pilot's speed"]

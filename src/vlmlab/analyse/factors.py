"""Figures of two factors, and of accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmlab.analyse.combination import Combination, short_names
from vlmlab.analyse.figure import BAR, CHANCE, INK
from vlmlab.analyse.pareto import front
from vlmlab.analyse.stats import Interval, mean_interval
from vlmlab.runs.files import replacing

COSTS = ("flops_sample", "visual_tokens", "params", "seconds")
"""Costs that a score is drawn against, the first that all compositions have and that differs between them."""
MOST_LEVELS = 12


def two_factors(rows: Sequence[Combination]) -> tuple[str, str] | None:
    """The two swept keys that a table of scores is made of: the first two of several levels each; None of fewer."""
    keys = list(rows[0].values) if rows else []
    several = [key for key in keys if 1 < len({row.values[key] for row in rows}) <= MOST_LEVELS]
    return (several[0], several[1]) if len(several) > 1 else None


def by_factors(
    rows: Sequence[Combination], keys: tuple[str, str], metric: str
) -> tuple[list[str], list[str], dict[tuple[str, str], Interval]]:
    """Levels of both keys, and of each pair the mean of a metric over all finished cells that have both.

    Args:
        rows: of the sweep.
        keys: two of the swept keys; over the others, and over seeds, the mean is taken.
        metric: as in ``result.json``.
    """
    first, second = (list(dict.fromkeys(row.values[key] for row in rows)) for key in keys)
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        place = (row.values[keys[0]], row.values[keys[1]])
        values.setdefault(place, []).extend(row.by_seed(metric).values())
    return first, second, {place: mean_interval(found) for place, found in values.items() if found}


def draw_heatmap(path: Path, rows: Sequence[Combination], metric: str) -> Path | None:
    """Draw the scores of two factors as a table in colours; None where there are no two, or nothing has finished."""
    keys = two_factors(rows)
    if keys is None:
        return None
    first, second, found = by_factors(rows, keys, metric)
    if not found:
        return None
    grid = np.array([[found[a, b].mean if (a, b) in found else np.nan for b in second] for a in first])
    figure, axis = _figure(2.2 + 1.25 * len(second), 1.6 + 0.55 * len(first))
    shown = axis.imshow(grid, cmap="viridis", aspect="auto")
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    for (a, b), interval in found.items():
        dark = interval.mean < (low + high) / 2
        axis.text(
            second.index(b), first.index(a), str(interval), ha="center", va="center", fontsize=8,
            color="white" if dark else INK,
        )  # fmt: skip
    names = short_names(list(keys))
    axis.set_xticks(range(len(second)), second, fontsize=8)
    axis.set_yticks(range(len(first)), first, fontsize=8)
    axis.set_ylabel(names[0], fontsize=8)
    axis.set_xlabel(names[1], fontsize=8)
    axis.set_title(metric, fontsize=9, loc="left")
    figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=7)
    return _saved(figure, path)


def cost_axis(rows: Sequence[Combination], wanted: str | None = None) -> str | None:
    """The cost that scores are drawn against; None where no cost is known of all finished compositions."""
    done = [row for row in rows if row.finished]
    for name in COSTS if wanted is None else (wanted,):
        values = [row.cost(name) for row in done]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and (wanted is not None or len(set(known)) > 1):
            return name
    return None


def points(rows: Sequence[Combination], metric: str, cost: str) -> dict[str, tuple[float, Interval]]:
    """Of every composition that has both, by its label: its cost and its score."""
    found = {row.label: (row.cost(cost), row.interval(metric)) for row in rows}
    return {label: (x, y) for label, (x, y) in found.items() if x is not None and y is not None}


def best(found: Mapping[str, tuple[float, Interval]]) -> list[str]:
    """Labels of those on the Pareto front, from cheap to dear."""
    labels = list(found)
    places = front([found[label][0] for label in labels], [found[label][1].mean for label in labels])
    return [labels[place] for place in places]


def draw_pareto(path: Path, rows: Sequence[Combination], metric: str, cost: str) -> Path | None:
    """Draw scores against a cost with the front of those that no other beats; None where fewer than two are known."""
    found = points(rows, metric, cost)
    if len(found) < 2:
        return None
    figure, axis = _figure(7.5, 4.2)
    on = best(found)
    line = [found[label] for label in on]
    axis.step(
        [x for x, _ in line], [y.mean for _, y in line], where="post", color=CHANCE, linewidth=1.2, zorder=1,
        label="Pareto front",
    )  # fmt: skip
    for label, (x, y) in found.items():
        colour = BAR if label in on else "#BBBBBB"
        axis.errorbar(x, y.mean, yerr=y.half, color=colour, fmt="o", capsize=3, linewidth=1.2, zorder=2)
        beside = (6, 5) if label in on else (6, -11)
        axis.annotate(label, (x, y.mean), xytext=beside, textcoords="offset points", fontsize=7, color=INK)
    costs = [x for x, _ in found.values()]
    if min(costs) > 0 and max(costs) > 20 * min(costs):
        axis.set_xscale("log")
    axis.margins(x=0.14, y=0.12)
    axis.xaxis.get_offset_text().set_fontsize(7)
    axis.set_xlabel(f"{cost}, mean over seeds", fontsize=8)
    axis.set_title(f"{metric}\nagainst its cost; mean over seeds, 95 % interval", fontsize=9, loc="left")
    axis.legend(fontsize=7, frameon=False, loc="lower right")
    return _saved(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis


def _saved(figure: Any, path: Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path

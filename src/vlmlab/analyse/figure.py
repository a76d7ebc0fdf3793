"""The figures of a sweep: bars with intervals beside their floors and ceiling, and differences to a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmlab.analyse.combination import Combination
from vlmlab.analyse.compare import Comparison, Rows, row_band, rows_of
from vlmlab.analyse.results import FIRST, MetricKey
from vlmlab.evaluate.metrics.captions import CEILINGS
from vlmlab.evaluate.metrics.scoring import LOOKUP
from vlmlab.runs.files import replacing

MOST_PANELS = 6
STYLES = ("-", "--", ":")
"""Of lines, once the ten colours are used up."""
BAR, INK, SHUFFLED, LOOKED_UP, CHANCE, CEILING = "#4C78A8", "#222222", "#E45756", "#B279A2", "#777777", "#54A24B"


def draw(path: Path, rows: Sequence[Combination], metrics: Sequence[str]) -> Path | None:
    """Draw the first score of every benchmark; None when there is nothing to draw.

    Args:
        path: the PNG to write.
        rows: the combinations, from top to bottom.
        metrics: scores, the most telling first; one panel for the first of each benchmark.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, str] = {}
    telling = [name for name in metrics if MetricKey.parse(name).score in FIRST]
    for name in telling or metrics:
        panels.setdefault(MetricKey.parse(name).benchmark, name)
    chosen = list(panels.values())[:MOST_PANELS]
    if not chosen:
        return None
    longest = max(len(row.label) for row in rows)
    size = (0.07 * longest + 0.6 + 3.2 * len(chosen), 1.3 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, chosen, strict=True):
        _panel(axis, rows, name)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path


def draw_differences(path: Path, comparisons: Sequence[Comparison], metric: str) -> Path | None:
    """Draw differences to a baseline with their two intervals; None where there is no difference.

    Args:
        path: the PNG to write.
        comparisons: from top to bottom.
        metric: what was compared, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [(one, one.difference) for one in comparisons if one.difference is not None]
    if not known:
        return None
    longest = max(len(one.row.label) for one, _ in known)
    figure = Figure(figsize=(0.07 * longest + 5.0, 1.3 + 0.42 * len(known)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.axvline(0.0, color=CHANCE, linewidth=1.0, zorder=1)
    for y, (one, difference) in enumerate(known):
        if one.both is not None:
            axis.errorbar(one.both.mean, y, xerr=one.both.half, color=LOOKED_UP, linewidth=1.2, capsize=3, zorder=2)
        axis.errorbar(difference.mean, y, xerr=difference.half, color=BAR, linewidth=3.5, fmt="o", zorder=3)
    axis.set_yticks(range(len(known)), [one.row.label for one, _ in known])
    axis.set_ylim(len(known) - 0.4, -0.6)
    axis.set_title(f"{metric}\ndifference to the baseline", fontsize=9, loc="left")
    axis.plot([], [], color=BAR, linewidth=3.5, label="95 %, over seeds on these questions")
    if any(one.both for one, _ in known):
        axis.plot([], [], color=LOOKED_UP, linewidth=1.2, label="95 %, over seeds and questions")
    axis.tick_params(labelsize=8, left=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def draw_curves(path: Path, rows: Sequence[Combination], name: str, read: Rows = rows_of) -> Path | None:
    """Draw a number that runs looked at while they trained: mean over seeds and its 95 % interval; None without any.

    Args:
        path: the PNG to write.
        rows: the combinations, each a line.
        name: of the number, as in ``metrics.jsonl``.
        read: gives what a run wrote while it trained.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bands = {row.label: band for row in rows if (band := row_band(row, name, read))}
    if not bands:
        return None
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (label, band) in enumerate(bands.items()):
        steps, means = [step for step, _ in band], [interval.mean for _, interval in band]
        ends = [(interval.low, interval.high) for _, interval in band if interval.half is not None]
        (line,) = axis.plot(steps, means, linewidth=1.6, label=label, linestyle=STYLES[i // 10 % len(STYLES)])
        if len(ends) == len(steps):
            lows, highs = zip(*ends, strict=True)
            axis.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("optimizer steps, over all stages", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axis.set_title(f"{name}\nmean over seeds, 95 % interval", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _panel(axis: Any, rows: Sequence[Combination], name: str) -> None:
    key = MetricKey.parse(name)
    intervals = [row.interval(name) for row in rows]
    shuffled = [row.interval(f"{name}/shuffled") for row in rows]
    top = max((i.high or i.mean for i in intervals if i), default=1.0)
    for y, (row, interval) in enumerate(zip(rows, intervals, strict=True)):
        if interval is None:
            axis.text(0.01 * top, y, row.state, va="center", fontsize=8, color=SHUFFLED, style="italic")
            continue
        axis.barh(y, interval.mean, height=0.62, color=BAR, zorder=2)
        if interval.half is not None:
            axis.errorbar(interval.mean, y, xerr=interval.half, color=INK, capsize=3, linewidth=1.2, zorder=3)
        axis.text(1.01, y, f"{interval.mean:.3f}", va="center", fontsize=8, transform=axis.get_yaxis_transform())
    points = [(i.mean, y) for y, i in enumerate(shuffled) if i]
    if points:
        lows, highs = [y - 0.31 for _, y in points], [y + 0.31 for _, y in points]
        axis.vlines(
            [x for x, _ in points], lows, highs, color=SHUFFLED, linewidth=2.5, zorder=4, label="shuffled images"
        )
    _level(axis, rows, f"{name}/{LOOKUP}", LOOKED_UP, "-.", "commonest training answer (lookup)")
    _level(axis, rows, f"{key.benchmark}/chance", CHANCE, "--", "chance")
    for who in CEILINGS.values():
        _level(axis, rows, f"{key.benchmark}/{who}/{key.score}", CEILING, ":", f"{who} (leave one out)")
    axis.set_title(f"{key.benchmark}\n{key.score}", fontsize=9, loc="left")
    axis.set_xlim(left=0)
    axis.margins(x=0.03)
    axis.tick_params(labelsize=8, left=False)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6, zorder=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _level(axis: Any, rows: Sequence[Combination], name: str, colour: str, style: str, label: str) -> None:
    """One vertical line at the mean level over the combinations (it belongs to the data, not to the run)."""
    levels = [interval.mean for row in rows if (interval := row.interval(name))]
    if levels:
        axis.axvline(sum(levels) / len(levels), color=colour, linestyle=style, linewidth=1.2, zorder=4, label=label)

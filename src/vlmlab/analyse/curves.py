"""Loss curves of a run as SVG, one small chart per stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmlab.analyse.results import FIRST, MetricKey

WIDTH, HEIGHT = 310, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 30, 24
MOST_POINTS = 300
"""Longer curves are averaged down to so many points."""
COLOURS = ("#3b6ea8", "#d1495b", "#5a8f3c", "#8e6c8a")

SLICE = "slice/"
"""Beginning of the names of scores that ``evaluation.slices`` asks for."""

Point = tuple[float, float]


@dataclass
class Curves:
    """The losses of one stage: name of the loss to its (step, value) points."""

    stage: str
    lines: dict[str, list[Point]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Drawn curves: texts and SVG attributes; a template puts them together, so that it alone escapes text."""

    title: str
    lines: list[tuple[str, str, str]]
    """Name, colour and ``points`` of every polyline."""
    ticks: list[tuple[float, str]]
    """Height in pixels and label of the horizontal rules."""
    first_step: str
    last_step: str


def read_curves(rows: Iterable[Mapping[str, Any]]) -> list[Curves]:
    """The losses in ``metrics.jsonl`` per stage, in order.

    A row has ``step``, perhaps ``stage``, and numbers; a number called ``loss`` or ``loss/<objective>``, or whose name
    ends in ``/loss`` or ``_loss``, is a curve. Values that are not finite are left out, and so is the loss of the only
    objective, which is the loss.
    """
    stages: dict[str, Curves] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int | float):
            continue
        stage = str(row.get("stage", ""))
        for name, value in row.items():
            wanted = name == "loss" or name.startswith("loss/") or name.endswith(("/loss", "_loss"))
            if wanted and isinstance(value, int | float) and math.isfinite(value):
                curves = stages.setdefault(stage, Curves(stage))
                curves.lines.setdefault(name, []).append((float(step), float(value)))
    for curves in stages.values():
        terms = [name for name in curves.lines if name.startswith("loss/")]
        if len(terms) == 1 and "loss" in curves.lines:
            del curves.lines[terms[0]]
    return list(stages.values())


def read_slices(rows: Iterable[Mapping[str, Any]]) -> list[Curves]:
    """Scores of slices of benchmarks that a run asked while it trained, per stage and benchmark, in order.

    Of every benchmark the scores that its table begins with (`FIRST`), and the same with wrong images.
    """
    charts: dict[tuple[str, str], Curves] = {}
    for row in rows:
        step, stage = row.get("step"), str(row.get("stage", ""))
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        for name, value in row.items():
            key = MetricKey.parse(name.removeprefix(SLICE)) if name.startswith(SLICE) else None
            if key is None or key.score not in FIRST or key.kind or key.baseline not in ("", "shuffled"):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                curves = charts.setdefault((stage, key.benchmark), Curves(f"{stage}: {key.benchmark}"))
                curves.lines.setdefault(key.baseline or key.score, []).append((float(step), float(value)))
    return list(charts.values())


def draw_chart(curves: Curves) -> Chart:
    """Scale the curves of a stage into a chart of WIDTH x HEIGHT pixels; the scale starts at 0."""
    lines = {name: thinned(points) for name, points in curves.lines.items()}
    steps = [step for points in lines.values() for step, _ in points]
    top = max(max(value for points in lines.values() for _, value in points), 1e-9)
    first, last = min(steps), max(steps)
    across = (WIDTH - LEFT - RIGHT) / max(last - first, 1e-9)
    down = (HEIGHT - TOP - BOTTOM) / top

    def place(point: Point) -> str:
        return f"{LEFT + (point[0] - first) * across:.1f},{HEIGHT - BOTTOM - max(point[1], 0) * down:.1f}"

    drawn = [
        (name, COLOURS[i % len(COLOURS)], " ".join(map(place, points)))
        for i, (name, points) in enumerate(lines.items())
    ]
    known = [step for points in curves.lines.values() for step, _ in points]
    begin, end = min(known), max(known)
    ticks = [(HEIGHT - BOTTOM - share * top * down, f"{share * top:.3g}") for share in (0.0, 0.5, 1.0)]
    return Chart(curves.stage or "training", drawn, ticks, f"{begin:.0f}", f"{end:.0f}")


def thinned(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[point] for point in points]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]

"""``report.html`` of a sweep: one self-contained page with its table, figures, and two cells' answers side by side."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmlab.analyse.combination import Combination, combinations, short_names
from vlmlab.analyse.factors import best, cost_axis, draw_heatmap, draw_pareto, points
from vlmlab.analyse.figure import draw, draw_curves
from vlmlab.analyse.report import SHOWN_SIDE, png_base64
from vlmlab.analyse.results import FIRST, MetricKey, RunRecord
from vlmlab.analyse.sweep import main_metrics, score_cells
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.metrics.vqa import VqaAccuracy
from vlmlab.runs.files import write_atomic

TEMPLATE = "sweep.html.jinja"
CURVES = ("held_out/gap", "held_out/loss", "loss")
"""Numbers of ``metrics.jsonl`` that are drawn over the steps, where they are there."""


@dataclass(frozen=True)
class Pair:
    """One image and what two cells answered about it.

    Attributes:
        image: (H, W, 3) uint8.
        image_id: its name.
        rows: of each turn, the answer of the first cell and that of the second.
    """

    image: NDArray[np.uint8]
    image_id: str
    rows: Sequence[tuple[Row, Row]]


def telling_cells(records: Sequence[RunRecord], metric: str | None = None) -> list[str]:
    """Names of the first composition's cell and of the best other one's of the same seed; fewer where there are none.

    Args:
        records: of the sweep.
        metric: that says which is best; None: the first of the table.
    """
    name = metric or _first(main_metrics(records))
    rows = [row for row in combinations(records) if row.by_seed(name)]
    if len(rows) < 2:
        return [record.folder.name for record in (rows[0].finished[:2] if rows else [])]
    seed, first = next(iter(rows[0].of_seed(name).items()))
    others = [row.of_seed(name)[seed] for row in rows[1:] if seed in row.of_seed(name)]
    ranked = sorted(others, key=lambda record: -record.metrics[name])
    return [first.folder.name, *(record.folder.name for record in ranked[:1])]


def write_sweep_report(
    sweep: Path,
    records: Sequence[RunRecord],
    names: tuple[str, str] = ("", ""),
    pairs: Sequence[Pair] = (),
    metric: str | None = None,
    cost: str | None = None,
    why: str = "",
) -> Path:
    """Write ``report.html`` into a sweep's folder and return its path.

    Everything is in the one file: no script, no outside resource. Every text is escaped by the template engine. A
    figure that cannot be drawn is a line that says why.

    Args:
        sweep: the folder.
        records: its cells.
        names: of the two cells whose answers are shown.
        pairs: those answers.
        metric: of heatmap and Pareto plot; None: the first of the table.
        cost: that it is drawn against; None: the first of `COSTS` that differs.
        why: there are no answers to show; empty where that needs no word.

    Raises:
        UserError: no finished cell has the metric, or the cost.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rows = combinations(records)
    metrics = main_metrics(records)
    chosen = _metric(rows, metrics, metric)
    axis = cost_axis(rows, cost)
    if cost is not None and axis is None:
        known = sorted({name for row in rows for record in row.finished for name in record.cost})
        raise UserError(f"cost={cost} is not of every finished cell; choose from {', '.join(known) or 'none'}")
    titles, cells = score_cells(rows, metrics)
    environment = Environment(
        loader=PackageLoader("vlmlab.analyse", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        title=f"Sweep {sweep.name}",
        summary=_summary(records),
        keys=len(short_names(list(rows[0].values)) or ["sweep"]) if rows else 1,
        titles=[title.replace("\n", " ") for title in titles],
        cells=cells,
        figures=_figures(rows, metrics, chosen, axis),
        names=names,
        pairs=[_pair(pair) for pair in pairs],
        why=why,
        missing=[(r.folder.name, r.state, r.reason) for r in records if not r.done],
    )
    path = sweep / "report.html"
    write_atomic(path, page)
    return path


def _metric(rows: Sequence[Combination], metrics: Sequence[str], wanted: str | None) -> str | None:
    if wanted is None:
        return _first(metrics) or None
    if not any(row.interval(wanted) for row in rows):
        raise UserError(f"no finished cell has metric={wanted}; its result.json names those there are")
    return wanted


def _first(metrics: Sequence[str]) -> str:
    """The first accuracy, or else the first score; empty where there is none."""
    accuracies = [name for name in metrics if MetricKey.parse(name).score == FIRST[0]]
    return next(iter([*accuracies, *metrics]), "")


def _summary(records: Sequence[RunRecord]) -> str:
    states = [record.state for record in records]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(records)} cells: {counted}"


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: its heading, its picture in base64 (or why there is none), and a sentence below it."""

    title: str
    png: str
    why: str = ""
    below: str = ""


def _figures(rows: Sequence[Combination], metrics: Sequence[str], metric: str | None, cost: str | None) -> list[Drawn]:
    """The figures that there is something to draw for."""
    found: list[Drawn | None] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.png"
        if metrics:
            found.append(_drawn("Scores", file, lambda: draw(file, rows, metrics), "Bars: 95 % interval over seeds."))
        for name in CURVES:
            found.append(_drawn(f"While they trained: {name}", file, partial(draw_curves, file, rows, name)))
        if metric is not None:
            found.append(_drawn("Two factors", file, lambda: draw_heatmap(file, rows, metric)))
        if metric is not None and cost is not None:
            on = ", then ".join(best(points(rows, metric, cost)))
            below = f"No other composition costs as little and scores as high as: {on}."
            found.append(_drawn("Score against cost", file, lambda: draw_pareto(file, rows, metric, cost), below))
    return [one for one in found if one is not None]


def _drawn(title: str, file: Path, make: Callable[[], Path | None], below: str = "") -> Drawn | None:
    try:
        if make() is None:
            return None
        return Drawn(title, base64.b64encode(file.read_bytes()).decode("ascii"), below=below)
    except Exception as error:  # the table must come whatever the drawing library says
        return Drawn(title, "", f"no figure: {type(error).__name__}: {error}")


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "png": png_base64(pair.image),
        "image_id": pair.image_id,
        "large": min(pair.image.shape[:2]) >= SHOWN_SIDE,
        "turns": [_turn(one, other) for one, other in pair.rows],
    }


def _turn(one: Row, other: Row) -> dict[str, Any]:
    caption = len(one.references) > 1 and len(" ".join(one.references).split()) > 5 * len(one.references)
    return {
        "kind": one.kind,
        "prompt": re.sub(r"\s+", " ", one.prompt.replace(IMAGE_TAG, "")).strip(),
        "expected": " / ".join(list(dict.fromkeys(one.references))[:2]),
        "answers": [(row.prediction, "caption" if caption else _verdict(row)) for row in (one, other)],
    }


def _verdict(row: Row) -> str:
    if not row.references:
        return "caption"
    score = VqaAccuracy().score(row)
    return "right" if score >= 1 else "partly" if score > 0 else "wrong"

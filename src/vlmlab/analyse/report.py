"""``report.html``: a run in one self-contained page, with samples to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from vlmlab.analyse import curves
from vlmlab.analyse.answers import intervals_over_questions
from vlmlab.analyse.results import FIRST, MetricKey, numbers, parse_overrides
from vlmlab.analyse.table import OF_ONE_MODEL, benchmark_tables, shown
from vlmlab.analyse.text import short_number
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.evaluate.metrics.captions import CEILINGS
from vlmlab.evaluate.metrics.rows import Row
from vlmlab.evaluate.metrics.scoring import BESIDE
from vlmlab.evaluate.metrics.vqa import VqaAccuracy
from vlmlab.runs.files import read_rows, read_yaml, write_atomic

TEMPLATE = "report.html.jinja"
SHOWN_SIDE = 160
"""Images at least this large are shown smoothly, smaller ones with their pixels."""


@dataclass(frozen=True)
class ReportItem:
    """One image of the report with everything said about it.

    Attributes:
        image: (H, W, 3) uint8.
        image_id: its name.
        rows: the answered turns, captions and questions alike.
        shuffled: the same turns answered with another image, matched by benchmark, id and turn; may be empty.
    """

    image: NDArray[np.uint8]
    image_id: str
    rows: Sequence[Row]
    shuffled: Sequence[Row] = ()


def write_report(folder: Path, items: Sequence[ReportItem], result: Mapping[str, Any], title: str) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Everything is in the one file: no script, no outside resource. Every text is escaped by the template engine.

    Args:
        folder: the run's folder; ``metrics.jsonl`` and ``config.yaml`` are read from it where they are there.
        items: the images to show, about a dozen.
        result: the contents of ``result.json``.
        title: heading of the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    metrics = numbers(result.get("metrics"))
    intervals, logged = intervals_over_questions(folder, metrics), read_rows(folder / "metrics.jsonl")
    environment = Environment(
        loader=PackageLoader("vlmlab.analyse", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        title=title,
        summary=_summary(result),
        headlines=headlines(metrics),
        items=[_item(item, metrics) for item in items],
        tables=[asdict(table) for table in benchmark_tables(metrics, intervals)],
        told=OF_ONE_MODEL if intervals else "",
        charts=[curves.draw_chart(stage) for stage in curves.read_curves(logged)],
        asked=[curves.draw_chart(asked) for asked in curves.read_slices(logged)],
        cost=[(name, short_number(value)) for name, value in numbers(result.get("cost")).items()],
        config=_config(folder),
        width=curves.WIDTH,
        height=curves.HEIGHT,
        shown=shown,
        left=curves.LEFT,
        right=curves.RIGHT,
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _summary(result: Mapping[str, Any]) -> str:
    overrides = parse_overrides(map(str, result.get("overrides") or ()))
    seed = f"seed {result['seed']}" if "seed" in result else ""
    changed = " ".join(f"{key}={value}" for key, value in overrides.items()) or "the default"
    return ", ".join(part for part in (changed, seed) if part)


def headlines(metrics: Mapping[str, float]) -> list[dict[str, str]]:
    """The first score of every benchmark with the levels it is to be compared with."""
    heads: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        key = MetricKey.parse(name)
        if key.score not in FIRST or key.kind or key.baseline or key.benchmark in heads:
            continue
        levels = {
            **{floor: metrics.get(f"{name}/{floor}") for floor in BESIDE},
            "chance": metrics.get(f"{key.benchmark}/chance"),
            **{who: metrics.get(f"{key.benchmark}/{who}/{key.score}") for who in CEILINGS.values()},
        }
        beside = ", ".join(f"{label} {level:.3f}" for label, level in levels.items() if level is not None)
        heads[key.benchmark] = {
            "benchmark": key.benchmark, "score": key.score, "value": f"{value:.3f}", "beside": beside,
        }  # fmt: skip
    return list(heads.values())


def _item(item: ReportItem, metrics: Mapping[str, float]) -> dict[str, Any]:
    shuffled = {(row.benchmark, row.id, row.turn): row.prediction for row in item.shuffled}
    return {
        "png": png_base64(item.image),
        "image_id": item.image_id,
        "large": min(item.image.shape[:2]) >= SHOWN_SIDE,
        "turns": [_turn(row, shuffled.get((row.benchmark, row.id, row.turn)), metrics) for row in item.rows],
    }


def _turn(row: Row, shuffled: str | None, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "prompt": row.prompt.replace(IMAGE_TAG, "").strip(),
        "prediction": row.prediction,
        "references": row.references,
        "expected": " / ".join(dict.fromkeys(row.references)),
        "verdict": _verdict(row, metrics),
        "shuffled": shuffled,
    }


def _verdict(row: Row, metrics: Mapping[str, float]) -> str:
    """``caption`` or ``box`` where the benchmark has a score of those; else ``right``, ``partly`` or ``wrong``."""
    if f"{row.benchmark}/cider_d" in metrics or not row.references:
        return "caption"
    if f"{row.benchmark}/iou_accuracy" in metrics:
        return "box"
    score = VqaAccuracy().score(row)
    return "right" if score >= 1 else "partly" if score > 0 else "wrong"


def png_base64(image: NDArray[np.uint8]) -> str:
    """A (H, W, 3) uint8 image as a PNG in base64."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8)).save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode("ascii")


def _config(folder: Path) -> dict[str, Any] | None:
    """The run's configuration: its parts in one line each, and all of it as text; None where there is none."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        config = read_yaml(file)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        config = None
    parts = [(str(name), _part(value)) for name, value in config.items()] if isinstance(config, dict) else []
    return {"parts": [(name, line) for name, line in parts if line], "text": text}


def _part(value: Any) -> str:
    """``Mlp(layers=2, act=gelu)`` of a group that names its class; empty for everything else."""
    name, settings = plain_part(value)
    return f"{name}({', '.join(f'{key}={item}' for key, item in settings.items())})" if name else ""


def plain_part(value: Any) -> tuple[str, dict[str, Any]]:
    """The class that a group of a configuration names, and its plain settings; empty for everything else."""
    if not isinstance(value, dict) or "_target_" not in value:
        return "", {}
    plain = {name: item for name, item in value.items() if name != "_target_" and not isinstance(item, dict | list)}
    return str(value["_target_"]).rsplit(".", 1)[-1], plain

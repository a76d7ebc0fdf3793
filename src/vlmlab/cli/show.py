"""A result as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SUFFIXES = ("shuffled", "no_image")


def result_text(result: Mapping[str, Any]) -> str:
    """One line per metric of a ``result.json``: its value, the baselines where scored, and the number of items."""
    metrics: Mapping[str, Any] = result.get("metrics", {})
    ends = tuple(f"/{end}" for end in (*SUFFIXES, "count"))
    rows = [("metric", "value", *SUFFIXES, "n")]
    for key, value in metrics.items():
        if not key.endswith(ends):
            others = (metrics.get(f"{key}/{end}") for end in SUFFIXES)
            count = metrics.get(f"{key}/count")
            rows.append((key, _number(value), *map(_number, others), "" if count is None else f"{count:g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)

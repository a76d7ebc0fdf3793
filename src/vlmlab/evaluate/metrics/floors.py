"""What a score is worth above the highest score that answers reach which do not look."""

from __future__ import annotations

from collections.abc import Mapping


def above(accuracy: float, floors: Mapping[str, float], suffix: str = "") -> dict[str, float]:
    """``floor/<name>`` and ``normalised`` over the highest floor, of equals the first; empty where none is known."""
    if not floors or max(floors.values()) >= 1:
        return {}
    name = max(floors, key=lambda name: floors[name])
    floor = floors[name]
    return {f"floor/{name}{suffix}": floor, f"normalised{suffix}": (accuracy - floor) / (1 - floor)}

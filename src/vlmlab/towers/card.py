"""What every card of a tower says of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig


def facts(cfg: DictConfig, costs: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Seed, steps, seconds, threads and metrics, as the cards' templates name them."""
    stages = cfg.recipe.stages
    return {
        "seed": cfg.seed,
        "steps": ", ".join(f"{name} {stage.steps} x {stage.batch_size}" for name, stage in stages.items()),
        "seconds": costs["seconds"],
        "threads": cfg.trainer.threads,
        "metrics": "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
    }

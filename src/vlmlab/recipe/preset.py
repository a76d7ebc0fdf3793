"""What a preset says of itself."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf


def deviations(cfg: DictConfig) -> list[str]:
    """Where the chosen preset is not what its paper describes (``preset.deviates``), a sentence each."""
    found = OmegaConf.select(cfg, "preset.deviates") or ()
    return [f"the preset deviates from its paper: {text}" for text in found]

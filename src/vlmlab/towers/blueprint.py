"""Towers without weights: under ``torch.device("meta")`` a tower is built from its architecture alone.

``with torch.device("meta"): build_model(cfg)`` gives any composition at full size without reading or allocating a
weight and without a network: that is what a plan counts. Everywhere else nothing here is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.values import Architecture
from vlmlab.towers.source import embedded, resolve


def weightless() -> bool:
    """Whether modules are being built on the meta device, where no tensor has values."""
    return torch.empty(0).device.type == "meta"


def read_config(path: str, architecture: Architecture | None, key: str) -> PreTrainedConfig:
    """The config of a local folder, or for a hub id the architecture that stands beside it.

    Raises:
        UserError: an id without an architecture whose config cannot be reached; names the config key.
    """
    if _local(path):
        return AutoConfig.from_pretrained(resolve(path, key, weights=False))
    if architecture is not None:
        plain: Any = OmegaConf.to_container(architecture) if OmegaConf.is_config(architecture) else dict(architecture)
        return AutoConfig.for_model(**plain)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path} is neither a local folder nor a hub id within reach; give a folder.") from error


def read_tokenizer(path: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer of a folder or of an id that was downloaded before, and True; else the embedded one, and False.

    The embedded tokenizer knows few words, so that lengths counted by it are too large rather than too small.
    """
    where = str(Path(path).expanduser()) if _local(path) else path
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True), True
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(embedded("lm")), False


def _local(path: str) -> bool:
    return Path(path).expanduser().is_dir()

"""Towers without weights: under ``torch.device("meta")`` a tower is built from its architecture alone.

``with torch.device("meta"): build_model(cfg)`` gives any composition at full size without reading or allocating a
weight and without a network: that is what a plan counts. Everywhere else nothing here is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from vlmlab.contracts.errors import UserError, brief
from vlmlab.contracts.values import Architecture
from vlmlab.runs.files import read_json
from vlmlab.towers.source import embedded, resolve

OWN_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Passed to transformers whenever it reads a folder: it runs no code from there, asks no hub, and loads nothing."""

SAFE: dict[str, Any] = {**OWN_CODE, "use_safetensors": True}
"""The same for weights, which are never a pickle."""


def weightless() -> bool:
    """Whether modules are being built on the meta device, where no tensor has values."""
    return torch.empty(0).device.type == "meta"


def read_config(path: str, architecture: Architecture | None, key: str) -> PreTrainedConfig:
    """The config of a local folder, or for a hub id the architecture that is beside it.

    Raises:
        UserError: an id without an architecture whose config cannot be reached, or a config that cannot be read; names
            the config key.
    """
    if _local(path):
        return open_config(resolve(path, key, weights=False), path, key)
    if architecture is not None:
        plain: Any = OmegaConf.to_container(architecture) if OmegaConf.is_config(architecture) else dict(architecture)
        return AutoConfig.for_model(**plain)
    return open_config(resolve(path, key, weights=False), path, key)


def open_config(folder: Path, path: str, key: str) -> PreTrainedConfig:
    """The config of a tower's folder, of a family that transformers has; code that the folder brings is never run.

    Args:
        folder: where it is.
        path: what the user gave for it.
        key: the config key that holds it.

    Raises:
        UserError: it cannot be read, or only by the folder's own code.
    """
    with readable("config.json", folder, path, key):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **OWN_CODE)
    wanted = str(getattr(config, "_attn_implementation_internal", None) or "")
    if "/" in wanted:
        raise UserError(f"{key}={brief(path, 90)} wants attention from {brief(wanted, 60)}, which is code.")
    return config


def open_tokenizer(folder: Path, path: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a tower's folder; arguments and errors as for ``open_config``."""
    with readable("tokenizer", folder, path, key):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **OWN_CODE)
    return tokenizer


@contextmanager
def readable(what: str, folder: Path, path: str, key: str) -> Iterator[None]:
    """What transformers raises for a folder that it cannot read becomes one sentence; arguments as ``open_config``'s.

    Raises:
        UserError: naming the config key.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each field and file is checked in its own way
        settings = [read_json(folder / name) or {} for name in ("config.json", "tokenizer_config.json")]
        why = brief(" ".join(str(error).split()).rstrip(".") or type(error).__name__, 90)
        if any("auto_map" in found for found in settings):
            why = "it brings code of its own (auto_map), which is never run"
        remedy = "give a folder of a family that transformers has, as its save_pretrained writes it"
        raise UserError(f"{key}={brief(path, 90)} has no readable {what} ({why}); {remedy}.") from error


def read_tokenizer(path: str) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer of a folder or of an id that was downloaded before, and True; else the embedded one, and False.

    The embedded tokenizer knows few words, so that lengths counted by it are too large rather than too small.
    """
    where = str(Path(path).expanduser()) if _local(path) else path
    try:
        return AutoTokenizer.from_pretrained(where, **OWN_CODE), True
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(embedded("lm"), **OWN_CODE), False


def _local(path: str) -> bool:
    return Path(path).expanduser().is_dir()

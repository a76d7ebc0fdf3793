"""Where towers come from: a local folder, a hub id, or the package itself; and the hash that names their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from vlmlab.contracts.errors import UserError, brief
from vlmlab.runs.files import read_json, share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

RECIPES = {
    "demo": {"vision": "embedded_towers", "lm": "embedded_towers", "text": "embedded_text_tower"},
    "testbed": {"vision": "embedded_siglip", "lm": "embedded_text", "text": "embedded_siglip"},
}
"""The shipped towers, by pair and name, and the recipe that makes each."""


def embedded(name: str, pair: str = "demo") -> Path:
    """The folder of a shipped tower, "vision", "text" or "lm".

    Raises:
        UserError: no such pair, or the package was installed without its towers.
    """
    if pair not in RECIPES:
        raise UserError(f"There is no shipped pair {pair!r} of towers; set pair to one of: {', '.join(RECIPES)}.")
    home = Path(str(files("vlmlab"))) / "embedded"
    folder = home / name if pair == "demo" else home / pair / name
    if not (folder / "config.json").is_file():
        remedy = f"reinstall vlmlab, or rebuild it by `python train.py recipe={RECIPES[pair][name]}`"
        raise UserError(f"{folder} is missing; {remedy}.")
    return folder


def resolve(path: str, key: str, weights: bool = True) -> Path:
    """The local folder of a tower: the path itself, or the cached snapshot of a hub id.

    Args:
        path: folder or id.
        key: the config key that holds it.
        weights: whether they are needed; an architecture alone is read without.

    Raises:
        UserError: neither a folder nor a reachable hub id, or without weights in safetensors; names the config key.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{key}={path} has no config.json; give the folder that save_pretrained wrote.")
        return _safe(folder, path, key) if weights else folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"] if weights else ["*.json"]
    try:
        found = snapshot_download(path, allow_patterns=wanted)
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"{key}={path} is neither a local folder nor a hub id within reach; give a folder.") from error
    return _safe(Path(found), path, key) if weights else Path(found)


def _safe(folder: Path, path: str, key: str) -> Path:
    """The folder, if what transformers would load from it is safetensors: other weights are pickles, and run code."""
    if (why := _unsafe(folder)) is not None:
        remedy = "load it once in transformers, save_pretrained(folder), and give that folder"
        raise UserError(f"{key}={brief(path, 90)} {why}; {remedy}.")
    return folder


def _unsafe(folder: Path) -> str | None:
    """Why the weights of a folder are not taken; None: they are."""
    if "transformers_weights" in (read_json(folder / "config.json") or {}):
        return "names its weights in config.json (transformers_weights)"
    if (folder / "adapter_config.json").is_file():
        return "has an adapter beside its weights (adapter_config.json)"
    if (folder / WEIGHTS).is_file():
        return None
    if not (folder / INDEX).is_file():
        return "has no weights in safetensors"
    listed = (read_json(folder / INDEX) or {}).get("weight_map")
    for name in listed.values() if isinstance(listed, dict) and listed else [None]:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            return f"has {brief(repr(name), 40)} among its weights, which is not a safetensors file of that folder"
        if not (folder / name).is_file():
            return f"lacks {brief(name, 60)} of its weights"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars off while this is open: a tiny tower loads faster than its bar draws."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_tower(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained``, readable by anyone who may read the folder.

    Raises:
        UserError: a link lies in the folder, through which it would write.
    """
    for path in (folder, *folder.glob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link, and nothing is written through it; remove it.")
    with quiet():
        model.save_pretrained(folder)
    share(*folder.glob("*.safetensors"))


@lru_cache(maxsize=16)
def tower_hash(folder: Path) -> str:
    """sha256 over the safetensors files of a tower, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()

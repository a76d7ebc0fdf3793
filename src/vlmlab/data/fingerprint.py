"""What a configuration's data are, in a few words and hashes that change when their content does; free of torch.

Made for comparing: two runs, or a stop and what goes on after it, have learnt from the same data exactly if these are
equal. No image is opened: a file of images is known by its name, size and time, and the facts say so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.sample import SampleSource

HASHED = 256 * 2**20
"""Bytes of a file with images inside up to which its content is hashed; a larger one goes by its size and time."""

SIZE_AND_TIME = "size and time"

Facts = dict[str, Any]


def data_fingerprint(cfg: DictConfig) -> Facts:
    """The facts of every data source that a run reads: those its stages train on, their held-out rows, benchmarks.

    Args:
        cfg: the configuration; read are ``data`` and ``recipe.stages``.

    Returns:
        ``{"train": {name: facts}, "val": {...}, "benchmarks": {...}}``, and "pairs" if there
        are any; see `source_fingerprint`.

    Raises:
        UserError: data that cannot be read.
    """
    names = list(dict.fromkeys(str(stage.data) for stage in cfg.recipe.stages.values()))
    nodes = {
        "train": {name: cfg.data.train[name] for name in names if name in cfg.data.train},
        "val": {name: cfg.data.val[name] for name in names if name in (cfg.data.get("val") or {})},
        "benchmarks": {str(name): b.source for name, b in (cfg.data.get("benchmarks") or {}).items()},
    }
    if pairs := cfg.data.get("pairs"):
        nodes["pairs"] = {str(name): b.source for name, b in pairs.items()}
    known: dict[str, Facts] = {}  # the same source under several names is opened once
    return {part: {n: _of_node(node, known) for n, node in group.items()} for part, group in nodes.items()}


def train_fingerprint(cfg: DictConfig, name: str) -> Facts:
    """The facts of ``data.train.<name>`` alone."""
    return _of_node(cfg.data.train[name], {})


def source_fingerprint(source: SampleSource) -> Facts:
    """The facts of one source, as JSON knows them.

    It is asked for its own (``fingerprint()``, of one that reads files or other sources); one that generates its
    samples is what its class and its public plain attributes say.
    """
    told = getattr(source, "fingerprint", None)
    own: Mapping[str, Any] = _generated(source) if told is None else told()
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    facts: Facts = json.loads(json.dumps({"source": kind, "rows": len(source), **own}, default=str))
    return facts


def files_fingerprint(files: Iterable[Path]) -> Facts:
    """The contents of files of records (annotations): sha256, and bytes of all together."""
    paths = [Path(file).expanduser() for file in files]
    return {"files": _digest([_content(path) for path in paths]), "bytes": sum(path.stat().st_size for path in paths)}


def shards_fingerprint(files: Sequence[Path]) -> Facts:
    """Files with records and images inside: by content, or where they are large by name, size and time."""
    sizes = [file.stat().st_size for file in files]
    if sum(sizes) <= HASHED:
        return files_fingerprint(files) | {"images": "content"}
    facts = [(file.name, *_size_and_time(str(file))) for file in files]
    return {"files": _digest(facts), "bytes": sum(sizes), "images": SIZE_AND_TIME}


def images_fingerprint(root: Path, names: Iterable[str]) -> Facts:
    """Image files below a folder, each by its name, size and time; one that is gone counts as that."""
    each = sorted(set(names))
    digest = hashlib.sha256()
    for name in each:
        digest.update(repr((name, *_size_and_time(os.path.join(root, name)))).encode("utf-8", "surrogatepass"))
    return {"images": SIZE_AND_TIME, "image_files": len(each), "image_facts": digest.hexdigest()[:32]}


def _of_node(node: Any, known: dict[str, Facts]) -> Facts:
    plain = _unverified(OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node)
    key = json.dumps(plain, sort_keys=True, default=str)
    if key not in known:
        known[key] = source_fingerprint(instantiate(plain))
    return known[key]


def _unverified(value: Any) -> Any:
    """The arguments of sources without the wish to decode all images first."""
    if isinstance(value, dict):
        return {key: False if key == "verify" and item is True else _unverified(item) for key, item in value.items()}
    return [_unverified(item) for item in value] if isinstance(value, list) else value


def _generated(source: object) -> Facts:
    """The public attributes of an object that are plain values."""
    return {k: v for k, v in sorted(vars(source).items()) if not k.startswith("_") and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, str | int | float | bool)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _content(path: Path) -> str:
    return _hashed(str(path), *_size_and_time(str(path)))


@functools.lru_cache(maxsize=1024)
def _hashed(path: str, size: int, time: int) -> str:
    """sha256 of a file, read once for all sources made of it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]

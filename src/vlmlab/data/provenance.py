"""Whether a run's data are still what it was made with: the fingerprints of then and now, in words. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from vlmlab.contracts.errors import UserError, listed
from vlmlab.data.fingerprint import Facts, data_fingerprint

KEY = "data"
"""Of ``env.json``: the fingerprint of every source."""

GROUPS = ("train", "val", "benchmarks")

READ = ("data", "recipe")
"""What of a configuration names its sources."""

SAID = {
    "source": "another reader",
    "files": "its annotations",
    "bytes": "",  # of the annotations, which are named
    "image_files": "the list of its images",
    "image_facts": "its image files",
    "images": "",
    "places": "",  # of a mixture: its sources are named
}
"""A fact that differs -> what has changed; what else a source says of itself is named as it is."""


def data_of(config: DictConfig) -> Facts:
    """The fingerprints of a configuration's sources; empty where its data describe none.

    Raises:
        UserError: data that cannot be read.
    """
    trained = (OmegaConf.select(config, "data.train") or {}).values()
    if not trained or not all(isinstance(node, DictConfig) and "_target_" in node for node in trained):
        return {}
    asked = [str(name) for name in OmegaConf.select(config, "evaluation.held_out") or []]
    described: Any = OmegaConf.create({key: OmegaConf.to_container(config[key], resolve=True) for key in READ})
    described.data.val = {name: node for name, node in (described.data.get("val") or {}).items() if name in asked}
    return data_fingerprint(described)


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any], groups: tuple[str, ...] = GROUPS) -> list[str]:
    """One ``data.train.<name> (what changed)`` for every source that is another now, each change said once.

    What only one of the two knows of a source is left alone: other code may tell more of it.
    """
    found: dict[str, list[str]] = {}
    for group in groups:
        was, is_ = before.get(group) or {}, now.get(group) or {}
        for name in was:
            if name in is_ and (words := list(dict.fromkeys(_changes(was[name], is_[name])))):
                found.setdefault(", ".join(words), []).append(f"data.{group}.{name}")
    return [f"{', '.join(names)} ({words})" for words, names in found.items()]


def changed_since(env: Mapping[str, Any], config: DictConfig) -> str:
    """What of a run's data has changed since its ``env.json`` was written, for the line about it; empty: nothing."""
    before = env.get(KEY)
    if not before:
        return ""
    try:
        changed = changed_data(before, data_of(config))
    except (UserError, InstantiationException, OSError):
        return "its data cannot be read any more"
    return f"made with other data: {shown(changed)}" if changed else ""


def shown(changed: list[str]) -> str:
    """The changes, as many as fit."""
    return listed(changed, 130, "; ")


def _changes(was: Any, now: Any) -> Iterator[str]:
    if isinstance(was, list) and isinstance(now, list):
        for old, new in zip(was, now, strict=False):
            yield from _changes(old, new)
        if len(was) != len(now):
            yield f"{len(was)} sources before, {len(now)} now"
    if not isinstance(was, Mapping) or not isinstance(now, Mapping):
        return
    for key in was:
        if key not in now or was[key] == now[key]:
            continue
        if key == "rows":
            yield f"{was[key]} samples before, {now[key]} now"
        elif key == "sources":
            yield from _changes(was[key], now[key])
        elif words := SAID.get(key, f"{key}: {was[key]} before, {now[key]} now"):
            yield words

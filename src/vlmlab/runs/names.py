"""Names of run folders and sweep cells, made from overrides and never from the clock."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

NOT_THE_RESULT = (
    "name",
    "fresh",
    "share_stages",
    "logger",
    "callbacks",
    "hydra",
    "sweep",
    "preset.deviates",
    "cache.folder",
    "cache.max_gb",
    "data.captions",
    "trainer.save_every_s",
    "trainer.workers",
    "trainer.progress",
    "trainer.log_every",
)
"""Keys that do not change what a run computes: they enter neither names nor ``config_hash``."""

HOW = "sweep"
"""The group that says by what a sweep is run."""

SEED = "seed"
"""The key whose values are repetitions of one composition."""

LONGEST = 100
"""Longest cell name in characters; a longer one is cut and ends with 8 characters of hash."""


FOLDERS = {"data.benchmarks": "benchmark", "data.pairs": "benchmark", "recipe.stages": "stage"}
"""Keys of a configuration whose own keys become names of files, and what they name."""


def is_plain_name(name: str) -> bool:
    """Whether a file of this name lies where it is put: a single name, not hidden, of printable characters."""
    inside = name.isprintable() and not name.startswith(".") and not set(name) & set("/\\")
    return inside and 0 < len(name.encode()) <= 120


def short_hash(text: str) -> str:
    """The first 8 hexadecimal digits of the text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def override_key(override: str) -> str:
    """The key an override sets: ``a.b`` of ``+a.b=1``, ``connector`` of ``connector=mlp``."""
    return override.split("=", 1)[0].lstrip("+~")


def changes_result(key: str) -> bool:
    """Whether a key can change what a run computes (``NOT_THE_RESULT`` says which cannot)."""
    return not any(key == ignored or key.startswith(ignored + ".") for ignored in NOT_THE_RESULT)


def result_overrides(overrides: Iterable[str]) -> list[str]:
    """The overrides that can change what a run computes, sorted."""
    return sorted(o for o in overrides if changes_result(override_key(o)))


def cell_name(overrides: Sequence[str]) -> str:
    """A folder name such as ``connector-mlp_mask-bidir_seed-1``, in the order of the overrides.

    Letters, digits and ``-_.`` only, since Hydra cannot parse ``=`` in a path. A name that lost other characters
    than ``=`` or that is longer than ``LONGEST`` ends with 8 characters of hash: different cells stay different.
    """
    if not overrides:
        return "default"
    parts = [o.lstrip("+").replace("=", "-", 1) for o in overrides]
    clean = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts]
    name = "_".join(clean)
    if clean == parts and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9].rstrip('-_.')}-{short_hash(' '.join(overrides))}"


def run_name(name: str | None, overrides: Iterable[str]) -> str:
    """The name of a run or a sweep.

    The given one, or ``default`` without overrides, or their readable form and a hash of all of them.
    """
    if name:
        return str(name)
    chosen = result_overrides(overrides)
    if not chosen:
        return "default"
    readable = cell_name(chosen)[:60].rstrip("-_.")
    return f"{readable}-{short_hash(' '.join(chosen))}"

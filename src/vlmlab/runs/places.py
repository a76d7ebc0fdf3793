"""Where a run or a sweep is written when it has no name: the folder of what its command says of the training.

What only concerns the evaluation or the machine names no folder, so that the same training asked for with other such
keys is found and scored again. Importing this module registers the resolvers that ``conf/train.yaml`` uses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmlab.contracts.errors import UserError
from vlmlab.runs.config import plain
from vlmlab.runs.identity import DATA, about, training_leaves
from vlmlab.runs.names import SEED, cell_name, changes_result, override_key, result_overrides, run_name

GIVEN = "given"
"""In a name, instead of a value of which a training knows only whether there is one."""

ANOTHER = "another value"


def training_words(overrides: Iterable[str], cfg: DictConfig) -> list[str]:
    """What of a command names the folder: overrides that what is learnt depends on, and all that a sweep varies.

    Whether a key counts is asked of the composition itself: with another value, is it another training? A composition
    that cannot be resolved, or a key that does not take the other value, counts.

    Args:
        overrides: the task overrides.
        cfg: the composed configuration; in a sweep, of its fixed overrides.
    """
    words = result_overrides(overrides)
    swept = _swept(words)
    any_data = any(override_key(word) == DATA for word in swept)  # the composition has none of them
    training = _leaves(cfg)
    chosen: list[str] = []
    for word in words:
        key = override_key(word)
        certain = word in swept or about(key) == "training" or (any_data and key.startswith(f"{DATA}."))
        if certain or training is None or _leaves(cfg, key, ANOTHER) != training:
            chosen.append(word)
        elif _leaves(cfg, key, None) != training:
            chosen.append(f"{key}={GIVEN}")
    return chosen


def _leaves(cfg: DictConfig, *change: Any) -> dict[str, Any] | None:
    """What a configuration, perhaps with one key changed, says of the training; None: it cannot be resolved."""
    try:
        if change:
            cfg = copy.deepcopy(cfg)
            OmegaConf.set_struct(cfg, False)
            OmegaConf.update(cfg, *change, merge=False)
        return training_leaves(plain(cfg))
    except (UserError, OmegaConfBaseException):
        return None


def folder_of(parent: str, name: str | None, overrides: Sequence[str], training: Sequence[str]) -> str:
    """The folder of a run or of a sweep.

    Args:
        parent: the folder it is in.
        name: the given one.
        overrides: the task overrides. What this same command has begun when they all made the name stays its own.
        training: those that make the name.
    """
    before = Path(parent, run_name(name, overrides))
    return str(before if _begun(before) else Path(parent, run_name(name, training)))


def sweep_folder_of(parent: str, name: str | None, overrides: Sequence[str], training: Sequence[str]) -> str:
    """The folder of a sweep, as for `folder_of`: made from its keys and not from the values that are swept.

    So the same sweep with more seeds or values has the same folder, and grows there.
    """
    return folder_of(parent, name, overrides, keys_of_swept(training))


def keys_of_swept(overrides: Iterable[str]) -> list[str]:
    """The overrides without the seed, those that are swept by their keys alone."""
    chosen = [override for override in overrides if override_key(override) != SEED]
    swept = _swept(chosen)
    return [override_key(text) if text in swept else text for text in chosen]


def _swept(overrides: Sequence[str]) -> set[str]:
    parsed = OverridesParser.create().parse_overrides([*overrides])
    return {str(override.input_line) for override in parsed if override.is_sweep_override()}


def _begun(folder: Path) -> bool:
    """Whether a run, or a cell of a sweep, has begun in a folder."""
    return (folder / "config.yaml").is_file() or any(folder.glob("*/config.yaml"))


def register_resolvers() -> None:
    """Register ``vlmlab.training``, ``run_folder``, ``sweep_folder`` (one value per command) and ``cell_name``."""

    def training(overrides: Iterable[str], _root_: DictConfig) -> list[str]:
        return training_words(overrides, _root_)

    def cell(overrides: Iterable[str]) -> str:
        return cell_name([o for o in overrides if changes_result(override_key(o))])

    OmegaConf.register_new_resolver("vlmlab.training", training, replace=True)
    OmegaConf.register_new_resolver("vlmlab.run_folder", folder_of, replace=True)
    # Cached: Hydra composes every cell anew, with its own overrides, and all cells belong into one folder.
    OmegaConf.register_new_resolver("vlmlab.sweep_folder", sweep_folder_of, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("vlmlab.cell_name", cell, replace=True)


register_resolvers()

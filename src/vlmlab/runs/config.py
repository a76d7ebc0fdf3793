"""The resolved configuration of a run as plain values, its hash, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from vlmlab.contracts.errors import UserError, brief
from vlmlab.runs.names import changes_result
from vlmlab.runs.renamed import present_name

BEFORE: Mapping[str, Any] = {
    "init_from": None,
    "collate.questions": "conversation",
    "collate.control_tokens": "refuse",
    "connector.end": False,
    "connector.ends": 1,
    "connector.norm_eps": 1e-5,
    "encoder.class_token": False,
    "evaluation.watched": None,
    "evaluation.load_best": False,
    "evaluation.patience": None,
    "connector.activation": "gelu",
    "connector.own_layers": False,
    "trainer.nodes": 1,
    "image_range": "auto",  # of any source of data, as what follows
    "image_roots": [],
    "grid": 4,  # of the generated world, as what follows
    "objects": [1, 5],
    "kinds": None,
}
"""Keys that were added later -> what earlier runs did, so that they are still the same run."""

LOOKS = tuple(
    f"evaluation.{key}" for key in ("slices", "slice_samples", "max_share", "monitor", "mode", "save_best", "min_delta")
)
"""Keys of the validation during a stage; they count where it decides what is kept (`looks_decide`)."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration with every reference resolved, as dicts, lists, strings, numbers, booleans and None.

    Raises:
        UserError: naming the key that is missing, refers to nothing or names a class by a name it had before.
    """
    own = [str(key) for key in cfg if key != "hydra"]  # Hydra's node has missing values and is not ours
    job = OmegaConf.masked_copy(cfg, own)
    OmegaConf.copy_cache(cfg, job)
    try:
        value = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
        key = _missing(job) or error.full_key
        raise UserError(f"{key} is needed; write {key}=... on the command line") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        why = brief(str(error).splitlines()[0], 100)
        raise UserError(f"{key} cannot be resolved: {why}; give it a value, as in {key}=...") from error
    assert isinstance(value, dict)
    config: dict[str, Any] = json.loads(json.dumps(value, default=str))
    _refuse_old_names(config)
    return config


def _missing(cfg: DictConfig) -> str | None:
    """The first key without a value that is needed, by its own name and not by what refers to it."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    return next((key for key, value in leaves(raw, deep=True) if value == "???"), None)


def _refuse_old_names(config: Mapping[str, Any]) -> None:
    for key, value in leaves(config, deep=True):
        if isinstance(value, str) and (now := present_name(value)) != value:
            raise UserError(f"{key}={value} is now {now}; write {key}={now}")


def leaves(config: Mapping[str, Any], prefix: str = "", deep: bool = False) -> Iterator[tuple[str, Any]]:
    """Every ``(dotted key, value)`` of nested mappings; empty ones are values, and so are lists unless `deep`."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        inner = {str(i): v for i, v in enumerate(value)} if deep and isinstance(value, list) else value
        if isinstance(inner, Mapping) and inner:
            yield from leaves(inner, name + ".", deep)
        else:
            yield name, value


def _as_before(key: str, value: Any) -> bool:
    """Whether this key says what was done before there was such a key."""
    if key.startswith("data."):
        key = key.rpartition(".")[2]
    return key in BEFORE and BEFORE[key] == value


def looks_decide(config: Mapping[str, Any]) -> bool:
    """Whether what is seen while a stage trains says when it ends (``patience``) or what is scored (``load_best``)."""
    keys = config.get("evaluation")
    return isinstance(keys, Mapping) and (keys.get("patience") is not None or bool(keys.get("load_best")))


def result_leaves(config: Mapping[str, Any], looks: bool | None = None) -> dict[str, Any]:
    """The leaves that can change what a run computes, and the order of the recipe's stages, which counts too.

    Args:
        config: the plain configuration.
        looks: whether `LOOKS` are among them; None: where looks decide.
    """
    chosen = {key: value for key, value in leaves(config) if changes_result(key) and not _as_before(key, value)}
    if not (looks_decide(config) if looks is None else looks):
        chosen = {key: value for key, value in chosen.items() if key not in LOOKS}
    recipe = config.get("recipe")
    stages = recipe.get("stages") if isinstance(recipe, Mapping) else None
    if isinstance(stages, Mapping):
        chosen["recipe.stages (order)"] = list(stages)
    return chosen


def config_hash(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal for two runs exactly if they compute the same thing."""
    text = json.dumps(result_leaves(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One ``key: old -> new`` for every key that makes the hashes differ, sorted."""
    before, after = result_leaves(old), result_leaves(new)
    absent = "(absent)"
    keys = sorted(key for key in {*before, *after} if before.get(key, absent) != after.get(key, absent))
    return [difference(key, before.get(key, absent), after.get(key, absent)) for key in keys]


def difference(key: str, old: Any, new: Any) -> str:
    """``key: old -> new``, long values cut."""
    return f"{key}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."

"""What belongs to a run: budget, sizes, cache, name, seed, keys of a choice, files of the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.rules.asking import (
    Choices,
    Config,
    choice_of,
    class_of,
    is_count,
    keeps_features,
    sees_nothing,
    value_at,
)
from vlmlab.cli.rules.declared import declared
from vlmlab.cli.rules.machine import WHOLE
from vlmlab.data.readers.place import is_id, is_there
from vlmlab.runs.config import leaves
from vlmlab.runs.names import override_key

BASELINES = ("shuffled", "no_image")

QUESTIONS = ("conversation", "rows", "tree")

BUILT = ("encoder", "cache", "connector", "lm", "mask", "fusion", "adapter", "objective")
"""Groups whose choice is one class: the keys of its file are the constructor's."""

PATH_KEYS = ("path", "path_558k", "path_118k", "test_path", "file", "folder", "images", "image_folder", "root")
"""Keys of a data source that name something on disk; those that begin with path may name a data set of the hub."""


def possible_budget(cfg: Config, choices: Choices) -> str | None:
    """A budget scales steps up or down, never below nothing."""
    scale, most, limit = (value_at(cfg, f"budget.{key}") for key in ("steps_scale", "max_steps", "eval_limit"))
    if scale is not None and (not isinstance(scale, int | float) or isinstance(scale, bool) or not scale > 0):
        return f"budget.steps_scale={scale} leaves no step; give a number above 0"
    for key, value in (("max_steps", most), ("eval_limit", limit)):
        if value is not None and not is_count(value, 1):
            return f"budget.{key}={value} leaves nothing; give a whole number of at least 1, or null for no limit"
    return None


def possible_sizes(cfg: Config, choices: Choices) -> str | None:
    """Sizes of rows and batches are counts; a baseline that does not exist would be noticed after training."""
    keys = {
        "collate.pack_length": ", or null for one sample a row",
        "evaluation.lookup_samples": ", or null for none",
        "evaluation.every": ", or null for none while it trains",
    }
    for key in ("collate.max_length", "evaluation.batch_size", *keys):
        value = value_at(cfg, key)
        if value is not None and not is_count(value, 1):
            unlimited = keys.get(key, "")
            return f"{key}={value} is not possible; give a whole number of at least 1{unlimited}"
    baselines = value_at(cfg, "evaluation.baselines")
    for name in baselines if isinstance(baselines, list) else [baselines]:
        if name is not None and name not in BASELINES:
            return f"evaluation.baselines={name} is unknown; choose from {', '.join(BASELINES)}, or [] for none"
    return None


def known_questions(cfg: Config, choices: Choices) -> str | None:
    """How several questions about an image are read, in training and in evaluation."""
    questions, shares = value_at(cfg, "collate.questions"), value_at(cfg, "evaluation.share_images")
    if questions is not None and questions not in QUESTIONS:
        return f"collate.questions={questions} is unknown; choose from {', '.join(QUESTIONS)}"
    if shares is not None and not isinstance(shares, bool):
        return f"evaluation.share_images={shares} is unknown; choose true or false"
    return None


def watched(cfg: Config, choices: Choices) -> str | None:
    """Looks between the steps are one rank's own; with shards no rank has a model to look with."""
    if value_at(cfg, "evaluation.every") is not None and value_at(cfg, "trainer.strategy") == "fsdp2":
        return "evaluation.every cannot look while trainer.strategy=fsdp2 has cut the model; set evaluation.every=null"
    return None


def possible_cache(cfg: Config, choices: Choices) -> str | None:
    """A cache has a folder, a size, and one of two ways to write features down."""
    if not keeps_features(cfg):
        return None
    size, dtype, folder = (value_at(cfg, f"cache.{key}") for key in ("max_gb", "dtype", "folder"))
    if size is not None and (not isinstance(size, int | float) or isinstance(size, bool) or not size > 0):
        return f"cache.max_gb={size} holds nothing; give a number above 0 (in 10^9 bytes), or null for no limit"
    if dtype not in (None, "bfloat16"):
        return f"cache.dtype={dtype} is unknown; choose bfloat16, or null for features as computed"
    if not isinstance(folder, str) or not folder:
        return f"cache.folder={folder} is no folder; give one on a disk of this machine, or choose cache=none"
    return None


def features_to_keep(cfg: Config, choices: Choices) -> str | None:
    """A cache stands before a tower, and every rank asks that tower alone for the images it lacks."""
    cache, strategy = f"cache={choices.get('cache')}", value_at(cfg, "trainer.strategy")
    if not keeps_features(cfg):
        return None
    if sees_nothing(cfg):
        return f"{cache} keeps what an encoder sees and fusion={choices.get('fusion')} has none; choose cache=none"
    tower = class_of(cfg.get("encoder"))
    if declared(tower, "has_tower") is False:
        chosen = choice_of("encoder", tower)
        return f"{cache} keeps what a tower computes and encoder={chosen} has no tower; choose cache=none"
    if strategy is not None and strategy not in WHOLE:
        return (
            f"{cache} asks the encoder on one rank at a time and trainer.strategy={strategy} splits it over ranks; "
            "choose cache=none, or trainer.strategy=ddp"
        )
    return None


def possible_name(cfg: Config, choices: Choices) -> str | None:
    """A run's name is a folder below outputs/ or sweeps/."""
    name = value_at(cfg, "name")
    path = Path(str(name))
    if name is None or (not path.is_absolute() and path.parts and ".." not in path.parts):
        return None
    return f"name={name} is no folder below outputs; use letters, digits, - and _ (hydra.run.dir=... puts it elsewhere)"


def foreign_keys(cfg: Config, choices: Choices) -> str | None:
    """A preset may set keys of the choice it made, which another choice on the command line does not have."""
    given = {override_key(override) for override in choices.get("_overrides") or ()}
    for group in BUILT:
        node, file = cfg.get(group), conf_folder() / group / f"{choices.get(group)}.yaml"
        if not isinstance(node, Mapping) or not file.is_file():
            continue
        own = OmegaConf.load(file)
        if not isinstance(own, DictConfig) or node.get("_target_") != own.get("_target_"):
            continue
        known = {*own, *_filled(own)}
        for key in node:
            if key not in known and not any(name.startswith(f"{group}.{key}") for name in given):
                setter = "recipe" if choices.get("preset") in (None, "none") else "preset"
                return (
                    f"{group}.{key} is no key of {group}={choices[group]} and {setter}={choices.get(setter)} sets it; "
                    f"add ~{group}.{key} to the command, or leave {group} to the {setter}"
                )
    return None


def _filled(file: DictConfig) -> set[str]:
    """The keys that a choice's own defaults list fills from other groups, as in ``/memory_mask@sees: before``."""
    entries = (entry for entry in file.get("defaults") or () if isinstance(entry, Mapping))
    return {str(group).rpartition("@")[2].partition(".")[0] for entry in entries for group in entry}


def possible_sharing(cfg: Config, choices: Choices) -> str | None:
    """Stages are shared within a sweep, in a folder, or not at all."""
    value = value_at(cfg, "share_stages")
    if value is None or value is False or (isinstance(value, str) and value):
        return None
    return f"share_stages={value} is unknown; choose auto, false, or a folder that runs share stages in"


def possible_origin(cfg: Config, choices: Choices) -> str | None:
    """A run begins with the weights of one other run."""
    value = value_at(cfg, "init_from")
    if value is None or (isinstance(value, str) and value):
        return None
    return f"init_from={value} is no run; give the folder of one, perhaps with a stage, or null"


def possible_seed(cfg: Config, choices: Choices) -> str | None:
    """A seed is a whole number from 0."""
    seed = value_at(cfg, "seed")
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32:
        return None
    return f"seed={seed} is no seed; give a whole number from 0 to {2**32 - 1}"


def files_exist(cfg: Config, choices: Choices) -> str | None:
    """What a data source names on disk is there."""
    data = cfg.get("data")
    for key, value in leaves(data if isinstance(data, Mapping) else {}, "data."):
        name = key.rpartition(".")[2]
        if name not in PATH_KEYS or not isinstance(value, str):
            continue
        if not (is_there(value) or (name.startswith("path") and is_id(value))):
            return f"{key}={value} does not exist; give the path of your data, as in {key}=/where/it/is"
    return None

"""What belongs to a run: budget, sizes, cache, name, seed, keys of a choice, files of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlmlab.cli.rules.asking import (
    Choices,
    Config,
    choice_of,
    class_of,
    keeps_features,
    sees_nothing,
    value_at,
)
from vlmlab.cli.rules.declared import declared
from vlmlab.cli.rules.machine import WHOLE
from vlmlab.contracts.errors import listed
from vlmlab.contracts.values import shown
from vlmlab.data.readers.place import is_id, is_there
from vlmlab.runs.config import leaves
from vlmlab.runs.names import FOLDERS, is_plain_name

PATH_KEYS = ("path", "path_558k", "path_118k", "test_path", "file", "folder", "images", "image_folder", "root")
"""Keys of a data source that name something on disk; those that begin with path may name a data set of the hub."""


def watched(cfg: Config, choices: Choices) -> str | None:
    """Validation between the steps runs on one rank, and with shards no rank has a whole model; and what it reads."""
    every, names = value_at(cfg, "evaluation.every"), value_at(cfg, "evaluation.watched")
    if every is not None and value_at(cfg, "trainer.strategy") == "fsdp2":
        return "evaluation.every cannot be used with trainer.strategy=fsdp2 (sharded model); set evaluation.every=null"
    known = value_at(cfg, "data.val")
    for name in names if isinstance(names, list) else ():
        if not isinstance(known, Mapping) or name not in known:
            there = listed(known) if isinstance(known, Mapping) and known else "which has none"
            return f"evaluation.watched={shown(name)} is not in data.val; choose from it ({there}), or set null"
    if names and every is None:
        return "evaluation.watched is only looked at between steps; set evaluation.every=<steps>, or watched=null"
    return None


def slices(cfg: Config, choices: Choices) -> str | None:
    """Slices are of benchmarks, and part of validation."""
    names, known = value_at(cfg, "evaluation.slices"), value_at(cfg, "data.benchmarks")
    for name in names if isinstance(names, list) else ():
        if not isinstance(known, Mapping) or name not in known:
            there = listed(known) if isinstance(known, Mapping) and known else "which has none"
            return f"evaluation.slices={shown(name)} is not in data.benchmarks; choose from it ({there}), or set null"
    if names and value_at(cfg, "evaluation.every") is None:
        return "evaluation.slices are asked between steps; set evaluation.every=<steps>, or slices=null"
    return None


BEST = (("monitor", "held_out/loss"), ("mode", "min"), ("min_delta", 0.0))
"""Keys that say which look is the best, with the values of conf/train.yaml, which say nothing by themselves."""


def best_look(cfg: Config, choices: Choices) -> str | None:
    """The best look is one of some, by a number that they have."""
    keys = {key: value_at(cfg, f"evaluation.{key}") for key in ("save_best", "load_best", "patience")}
    chosen = next((f"{key}={shown(value)}" for key, value in keys.items() if value), None)
    if chosen is None:
        given = ((key, value_at(cfg, f"evaluation.{key}"), usual) for key, usual in BEST)
        idle = next((f"{key}={shown(value)}" for key, value, usual in given if value not in (None, usual)), None)
        return (
            idle
            and f"evaluation.{idle} says which validation is the best, and none is kept; set save_best=true or patience"
        )
    if value_at(cfg, "evaluation.every") is None:
        return f"evaluation.{chosen} needs validation during training; set evaluation.every=<steps>"
    if keys["load_best"] and not keys["save_best"]:
        return "evaluation.load_best=true scores what save_best keeps; set evaluation.save_best=true, too"
    monitor = str(value_at(cfg, "evaluation.monitor"))
    place, _, last = monitor.rpartition("/")
    kind, _, name = place.partition("/")
    held_out = last in ("loss", "shuffled_loss", "gap") and kind == "held_out"
    if held_out and name and name not in (value_at(cfg, "evaluation.watched") or ()):
        return f"evaluation.monitor={shown(monitor)} is not looked at; set evaluation.watched=[{name}]"
    of_slice = kind == "slice" and bool(name)
    if of_slice and name.partition("/")[0] not in (value_at(cfg, "evaluation.slices") or ()):
        return f"evaluation.monitor={shown(monitor)} is not asked; set evaluation.slices=[{name.partition('/')[0]}]"
    if not held_out and not of_slice:
        return (
            f"evaluation.monitor={shown(monitor)} is not a validation score; give held_out/loss, held_out/gap, "
            "held_out/<watched>/loss or slice/<benchmark>/<score>"
        )
    return None


def logger_to_make(cfg: Config, choices: Choices) -> str | None:
    """A logger's name alone makes none."""
    name = value_at(cfg, "logger.name")
    if name in (None, "jsonl", "none", "wandb") or value_at(cfg, "logger.make") is not None:
        return None
    return f"logger.name={shown(name)} logs nowhere without logger.make; write logger={shown(name)} for a file of conf/"


def features_to_keep(cfg: Config, choices: Choices) -> str | None:
    """A cache is in front of a tower, and every rank asks that tower alone for the images it lacks."""
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
    words = str(name).split("/")
    if name is None or all(re.fullmatch(r"[\w.+-]{1,150}", word) and word.strip(".") for word in words):
        return None
    return (
        f"name={shown(str(name))} is not a folder below outputs; use letters, digits, - and _ "
        "(hydra.run.dir=... puts it elsewhere)"
    )


def possible_names(cfg: Config, choices: Choices) -> str | None:
    """A benchmark's name is that of a file."""
    for key, what in FOLDERS.items():
        named = value_at(cfg, key)
        for name in named if isinstance(named, Mapping) else ():
            if not is_plain_name(str(name)):
                return f"{key}.{shown(str(name))} becomes a file's name; name the {what} by letters, digits, - and _"
    return None


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

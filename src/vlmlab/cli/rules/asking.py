"""What rules ask a resolved configuration, as plain values: its stages, and the classes that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.rules.declared import declared, source_of
from vlmlab.recipe.stage import parts_in
from vlmlab.runs.config import leaves

Config = Mapping[str, Any]

Choices = Mapping[str, Any]

Rule = Callable[[Config, Choices], str | None]


def value_at(cfg: Config, key: str) -> Any:
    """The value of a dotted key, None where it is not there."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def each_stage(cfg: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and keys of every stage of the recipe that is a mapping."""
    stages = value_at(cfg, "recipe.stages")
    for name, stage in (stages if isinstance(stages, Mapping) else {}).items():
        if isinstance(stage, Mapping):
            yield str(name), stage


def trained_by(stage: Mapping[str, Any]) -> set[str]:
    """The parts that a stage trains, or something in them."""
    return parts_in(stage.get("train"))


def keeps_features(cfg: Config) -> bool:
    """Whether features are kept on disk."""
    target = class_of(cfg.get("cache"))
    return target != "" and declared(target, "keeps") is not False


def class_of(node: Any) -> str:
    """The class that a part of the configuration describes; empty where it describes none."""
    return str(node.get("_target_") or "") if isinstance(node, Mapping) else ""


def classes_in(node: Any) -> list[str]:
    """The classes in a part of the configuration, however deep."""
    described = node if isinstance(node, Mapping) else {}
    return [str(value) for key, value in leaves(described) if key.rpartition(".")[2] == "_target_"]


def parts_of(node: Any) -> Iterator[Mapping[str, Any]]:
    """What describes a class in a part of the configuration, however deep."""
    if isinstance(node, Mapping):
        if class_of(node):
            yield node
        for value in node.values():
            yield from parts_of(value)


def objectives_of(cfg: Config, stage: Mapping[str, Any]) -> list[str]:
    """The classes of a stage's objectives; what these are made of themselves is left out."""
    node = stage.get("objective") or cfg.get("objective")
    several = [node] if class_of(node) or not isinstance(node, Mapping) else list(node.values())
    return [target for target in map(class_of, several) if target]


def declaring(name: str, cfg: Config, stage: Mapping[str, Any]) -> list[str]:
    """Those of a stage's objectives that declare something of themselves."""
    return [target for target in objectives_of(cfg, stage) if declared(target, name) is True]


def sees_nothing(cfg: Config) -> bool:
    """Whether the fusion reads no vision."""
    return declared(class_of(cfg.get("fusion")), "reads") == "nothing"


def in_the_sequence(cfg: Config) -> bool | None:
    """Whether the fusion, or one of several, puts visual tokens into the sequence; None where a class is not ours."""
    targets = classes_in(cfg.get("fusion"))
    said = {declared(target, "in_sequence") for target in targets}
    if True in said:
        return True
    return False if False in said and all(source_of(target) for target in targets) else None


def called(target: str, cfg: Config, choices: Choices) -> str:
    """An objective as it is chosen on the command line."""
    if value_at(cfg, "objective._target_") == target and choices.get("objective"):
        return f"objective={choices['objective']}"
    return f"objective={choice_of('objective', target)}"


def choice_of(group: str, target: str) -> str:
    """The first file of a group that chooses a class; the class itself where none does."""
    files = sorted((conf_folder() / group).glob("*.yaml"))
    return next((file.stem for file in files if OmegaConf.select(OmegaConf.load(file), "_target_") == target), target)


def reading_key(cfg: Config) -> str | None:
    """The key by which a connector reads the user's words; None where none does, or nothing reads its tokens."""
    connector = cfg.get("connector")
    if sees_nothing(cfg) or not isinstance(connector, Mapping):
        return None
    keys = (key for key, value in leaves(connector, "connector.") if value is True)
    return next((key for key in keys if key.rpartition(".")[2] == "instruction"), None)

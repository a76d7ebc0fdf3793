"""No key that nothing reads, none with a value that it cannot have: by the schema and by the plug-ins' own types."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, is_typeddict

from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.rules.asking import Choices, Config, choice_of, class_of, value_at
from vlmlab.cli.rules.constructors import constructor
from vlmlab.cli.rules.declared import inherits
from vlmlab.cli.rules.schema import Root
from vlmlab.cli.rules.words import closest, unread
from vlmlab.contracts.errors import reason
from vlmlab.contracts.values import hints, refusal, shown
from vlmlab.recipe.stage import KEYS
from vlmlab.runs.config import leaves
from vlmlab.runs.environment import package_folder
from vlmlab.runs.names import override_key
from vlmlab.runs.trust import source_of

GROUPS = ("encoder", "cache", "connector", "lm", "mask", "fusion", "adapter", "objective")
"""Groups whose choice is one class, in a package of the same name where it is ours."""

GIVEN: Mapping[str, tuple[str, ...]] = {"connector": ("in_width", "out_width")}
"""Arguments that the run itself gives to the classes of a group."""

HYDRA: Mapping[str, Any] = {"_recursive_": bool, "_convert_": Literal["none", "partial", "object", "all"]}
"""Keys beside ``_target_`` that Hydra reads."""

STAGE_MODULE = "vlmlab.engine.stage.StageModule"


def wrong_values(cfg: DictConfig, config: Config, choices: Choices, own: Any = None) -> Iterator[str]:
    """A sentence for every wrong key or value, the likeliest reason first.

    Args:
        cfg: the composed configuration.
        config: the same as plain values.
        choices: the chosen file of every group, and the overrides.
        own: what of the schema has the keys that a verb has beside those of a run.
    """
    raw = _raw(cfg)
    beside = {} if own is None else hints(own)
    yield from _overrides(config, choices, beside)
    yield from wrong_keys(own, {key: value for key, value in config.items() if key in beside})
    yield from _nothing_there(config)
    yield from (s for s in [refusal(Root, config, "")] if s is not None)
    read = {*beside, *_referred(raw)}
    typed = [override_key(word) for word in choices.get("_overrides") or ()]
    for name, known in _unread(Root, config, "", read):
        word = next((key for key in typed if key == name or key.startswith(f"{name}.")), name)
        yield unread(word, {*known, *(key for key, _ in leaves(config))} - {word, name})
    for where, node, inside in _described(config, raw, ""):
        yield from _of_part(where, node, inside, choices)
    for name, stage in config["recipe"]["stages"].items():
        yield from _of_stage(f"recipe.stages.{name}", stage)
        source = stage.get("data")
        if isinstance(source, str) and source in config["data"]["train"] and config["data"]["train"][source] is None:
            yield f"recipe.stages.{name}.data={source} is left out by data.train.{source}=null; name another source"
    for key, value in leaves(config, deep=True):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value} is not a finite number; give one"


def missing_sections(cfg: DictConfig) -> Iterator[str]:
    """Sections that null has taken the place of, before anything that refers into them is resolved."""
    for key, annotation in hints(Root).items():
        if key in cfg and not OmegaConf.is_missing(cfg, key) and not OmegaConf.is_interpolation(cfg, key):
            sentence = refusal(annotation, None, key) if cfg[key] is None else None
            if sentence is not None:
                yield sentence


def _nothing_there(config: Config) -> Iterator[str]:
    """Parts, sections and sources that null has taken the place of."""
    for key, value in leaves(config, deep=True):
        if key.rpartition(".")[2] == "_target_" and not isinstance(value, str):
            yield f"{key}={shown(value)} is not a class; give its dotted path"
    for group in ("val", "benchmarks"):
        sources = value_at(config, f"data.{group}")
        for name, node in sources.items() if isinstance(sources, Mapping) else ():
            if node is None:
                yield f"data.{group}.{name}=null is not a source of data; leave it out by ~data.{group}.{name}"


def wrong_keys(section: Any, config: Config) -> Iterator[str]:
    """What is wrong with the keys that a command has of its own."""
    if section is not None and (sentence := refusal(section, config, "")) is not None:
        yield sentence


def _raw(cfg: DictConfig) -> dict[str, Any]:
    """The configuration with its references as they are written."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    kept = {key: value for key, value in raw.items() if key != "hydra"}
    return dict(json.loads(json.dumps(kept, default=str)))  # keys are texts, as in the plain configuration


def lost_reference(cfg: DictConfig, hydra_cfg: Any) -> str | None:
    """A reference to a key of Hydra's that is not there, which would be read as null."""
    for key, value in leaves(_raw(cfg), deep=True):
        for name in re.findall(r"\$\{hydra:([\w.]+)\}", value) if isinstance(value, str) else ():
            if OmegaConf.select(OmegaConf.create({"hydra": hydra_cfg}), f"hydra.{name}") is None:
                return f"{key}={shown(value)} refers to hydra.{name}, which has no value; give it one of its own"
    return None


def _referred(raw: Mapping[str, Any]) -> set[str]:
    """Keys that a reference somewhere reads, as ``${data.path}`` reads ``data.path``."""
    texts = [value for _, value in leaves(raw, deep=True) if isinstance(value, str)]
    return {name for text in texts for name in re.findall(r"\$\{([\w.]+)\}", text)}


def _overrides(config: Config, choices: Choices, own: Collection[str]) -> Iterator[str]:
    """Words of the command line that would have no effect."""
    words = [word for word in choices.get("_overrides") or () if override_key(word).split(".")[0] not in own]
    yield from given_twice(words)
    for word in words:
        key, value = override_key(word), word.partition("=")[2]
        there = value_at(config, key)
        if value.startswith("[") and (conf_folder() / key).is_dir():
            yield f"{key}={shown(value)} is a list, whose choices would be mixed; give the name of a file of conf/{key}"
        if value == "{}" and isinstance(there, Mapping) and there:
            yield f"{key}={{}} changes nothing, since it is merged into what is there; leave it out"


def given_twice(words: Iterable[str]) -> Iterator[str]:
    """Keys with two values on the command line, of which Hydra takes the last."""
    given: dict[str, str] = {}
    for word in words:
        key, value = override_key(word), word.partition("=")[2]
        if not word.startswith("~") and value != given.setdefault(key, value):
            yield f"{key} is given twice, as {shown(given[key], 40)} and as {shown(value, 40)}; give it once"


def _unread(section: Any, node: Any, where: str, read: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Keys that are not in the schema and that no reference reads, each with those that are."""
    found = hints(section)
    for key, inner in node.items() if isinstance(node, Mapping) else ():
        name = f"{where}.{key}" if where else str(key)
        if key not in found:
            if section.__total__ and not any(name == other or other.startswith(f"{name}.") for other in read):
                yield name, [f"{where}.{other}".lstrip(".") for other in found]
            continue
        for nested, below in _sections(found[key], inner, name):
            yield from _unread(nested, below[1], below[0], read)


def _sections(annotation: Any, value: Any, name: str) -> Iterator[tuple[Any, tuple[str, Any]]]:
    """The sections below a key: itself, or each of its values."""
    if is_typeddict(annotation):
        yield annotation, (name, value)
    for inner in get_args(annotation):
        if is_typeddict(inner) and isinstance(value, Mapping):
            yield from ((inner, (f"{name}.{key}", below)) for key, below in value.items())
        else:
            yield from _sections(inner, value, name)


def _described(node: Any, raw: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """Every part with its key and as it is written; a reference is looked at where it is used."""
    if isinstance(raw, str):
        return
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if class_of(node):
        yield where, node, raw
    for key, inner in items:
        yield from _described(inner, raw[key], f"{where}.{key}".lstrip("."))


def _of_part(where: str, node: Mapping[str, Any], raw: Mapping[str, Any], choices: Choices) -> Iterator[str]:
    """What is wrong with the keys of one class."""
    target, group = class_of(node), where.split(".")[0]
    ours = target.startswith(f"{package_folder().name}.")
    try:
        takes = constructor(target)
    except ImportError as error:
        why = f" ({reason(error, 90)})" if not ours and str(error) else ""
        key = f"{where}._target_={shown(target)}"
        yield f"{key} cannot be imported{why}; give the dotted path of a class that is installed"
        return
    given = GIVEN.get(group, ())
    if (ours and where in GROUPS and target.split(".")[1] != group) or (
        not takes.open and any(key not in takes.types for key in given)
    ):
        yield f"{where}._target_={shown(target)} does not fit here; choose a file of conf/{group}, as {group}=..."
        return
    for key in node:
        if key not in takes.types and key not in HYDRA and key != "_target_" and not takes.open:
            yield _unknown(where, str(key), target, [*takes.types], choices)
        elif key in given:
            yield f"{where}.{key} comes from the encoder and the lm and cannot be set; leave it out"
    for key in takes.needed:
        if key not in node and key not in given:
            yield f"{where}.{key} is needed by {target.rpartition('.')[2]}; write {where}.{key}=..."
    for key, value in node.items():
        if (key in takes.types or key in HYDRA) and not class_of(value):  # a part is whatever it makes
            sentence = refusal(takes.types.get(key, HYDRA.get(key)), value, f"{where}.{key}")
            if sentence is not None:
                yield _as_written(sentence, where, raw)


def _as_written(sentence: str, where: str, raw: Mapping[str, Any]) -> str:
    """The sentence under the key where the value was given, if the one that it is about only refers to it."""
    key = sentence.partition("=")[0]
    value = value_at(raw, key.removeprefix(f"{where}."))
    origin = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return sentence if origin is None else f"{origin.group(1)}{sentence.removeprefix(key)} (it is read as {key})"


def _unknown(where: str, key: str, target: str, known: Collection[str], choices: Choices) -> str:
    """A key that a class does not take: the user's, a preset's for another choice, or a file's."""
    group, name = where.split(".")[0], f"{where}.{key}"
    takes = [f"{where}.{other}" for other in known if other not in GIVEN.get(group, ())]
    typed = {override_key(word) for word in choices.get("_overrides") or ()}
    if any(word.startswith(name) for word in typed):
        return unread(name, takes)
    setter = "recipe" if choices.get("preset") in (None, "none") else "preset"
    choice = choice_of(group, target)
    if where in GROUPS and choice != target and choices.get(setter) and f"{where}._target_" not in typed:
        return (
            f"{name} is not a key of {group}={choice} and {setter}={choices[setter]} sets it; "
            f"add ~{name} to the command, or leave {group} to the {setter}"
        )
    near = closest(name, takes)
    return f"{name} is not a key of {shown(target)}{near}; correct it in its file, or add ~{name} to the command"


def _of_stage(where: str, stage: Mapping[str, Any]) -> Iterator[str]:
    """Keys that no stage has, and a module of ours that is not a stage's; others are checked when they are built."""
    for key in stage:
        if key not in KEYS:
            yield unread(f"{where}.{key}", [f"{where}.{other}" for other in KEYS])
    for key in ("objective", "mask", "adapter"):
        if (sentence := refusal(hints(Root)[key] | None, stage.get(key), f"{where}.{key}")) is not None:
            yield sentence
    key, module = f"{where}.module", stage.get("module")
    target = module.get("_target_") if isinstance(module, Mapping) else module
    if not isinstance(target, str):
        return
    where, remedy = f"{key}={shown(target)}", "give a StageModule, as vlmlab.engine.alignment.AlignmentModule"
    if target.startswith(f"{package_folder().name}."):
        if source_of(target) is None or not inherits(target, STAGE_MODULE):
            yield f"{where} is not a StageModule; {remedy}"
        return
    try:
        constructor(target)
    except ImportError as error:
        yield f"{where} cannot be imported ({reason(error, 90)}); {remedy}"

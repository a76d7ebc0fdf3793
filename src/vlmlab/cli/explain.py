"""Hydra's and OmegaConf's composition errors, each as one sentence with the choices or the closest key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmlab.cli.flags import overrides_of
from vlmlab.cli.rules.asking import class_of
from vlmlab.cli.rules.constructors import keys_in
from vlmlab.cli.rules.words import closest, unread
from vlmlab.contracts.errors import brief, listed
from vlmlab.contracts.values import shown
from vlmlab.recipe.stage import KEYS

INSIDE = ("memory_mask", "pair_head")
"""Groups that no run has at the top: the files of other groups take a choice of them into one of their keys."""

COMPOSED = "train"
"""The configuration that has the groups; the others take a run or a sweep as it is."""


def explain(error: Exception, conf: Path, config_name: str, words: Sequence[str]) -> str | None:
    """What is wrong and what to write instead, or None for an error that is none of composition.

    Args:
        error: what Hydra raised.
        conf: the configuration folder.
        config_name: the primary configuration.
        words: of the command line; a misspelt key is compared with the keys of the choices that they make.
    """
    if isinstance(error, MissingConfigException):
        return _missing(error, words)
    if isinstance(error, OverrideParseException):
        hint = "quote special characters, as in 'key=\"a=b,c\"'"
        return f"the override {error.override!r} cannot be read: {_first(error)}; {hint}"
    if isinstance(error, ConfigCompositionException):
        return _composition(error, conf, config_name, words)
    if isinstance(error, OmegaConfBaseException):
        referring = next((word for word in words if "${" in word), None)
        return f"{referring or error.full_key or 'a value'} cannot be resolved: {_first(error)}; give it a value"
    if isinstance(error, yaml.YAMLError):
        return _no_yaml(error)
    if isinstance(error, HydraException):
        return _of_flags(error, words)
    return _unreadable(error, conf, words)


def _of_flags(error: HydraException, words: Sequence[str]) -> str:
    """What is wrong with where the configuration is looked for, under the option's name."""
    given = _flags(words)
    return f"{given}: {_first(error)}; leave it out, or correct the path" if given else _first(error)


def _flags(words: Sequence[str]) -> str:
    """The options that say where the configuration is, with their values."""
    flags = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p")
    given = [
        f"{word} {words[i + 1]}" if word in flags and i + 1 < len(words) else word
        for i, word in enumerate(words)
        if word.split("=")[0] in flags
    ]
    return " ".join(given)


def _no_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}," if mark is not None else "a configuration file"
    return f"{where} is not YAML that can be used here ({getattr(error, 'problem', None) or _first(error)}); correct it"


def _unreadable(error: Exception, conf: Path, words: Sequence[str]) -> str | None:
    """A word that Hydra's parser stumbles over without naming it; None where the fault is none of the words'."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = str(trace.tb_frame.f_globals.get("__name__")) if trace is not None else ""
    if raised_in.partition(".")[0] not in ("hydra", "omegaconf", "antlr4", "yaml"):
        return None
    if (sentence := _no_choice(words, conf)) is not None:
        return sentence
    return f"the command {brief(' '.join(words), 120)!r} cannot be read ({_first(error)}); give each word as key=value"


def _no_choice(words: Sequence[str], conf: Path) -> str | None:
    """A word that gives a group something else than names of files."""
    groups = {folder.name for folder in conf.iterdir() if folder.is_dir()}
    try:
        overrides = OverridesParser.create().parse_overrides(overrides_of(words))
    except OverrideParseException:
        return None
    for override in overrides:
        value = override.value() if not override.is_sweep_override() else ""
        names = value if isinstance(value, list) else [value]
        if override.key_or_group in groups and (
            not all(isinstance(name, str) for name in names) or any("${" in str(name) for name in names)
        ):
            group = override.key_or_group
            return f"{shown(override.input_line)} is not a choice of {group}; give the name of a file of conf/{group}"
    return None


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _missing(error: MissingConfigException, words: Sequence[str]) -> str:
    file = str(error.missing_cfg_file or "")
    group, _, choice = file.rpartition("/")
    if not group or not error.options:
        return _of_flags(error, words)
    word = next((word for word in words if re.split("[=@]", word.lstrip("+~"))[0] == group.split("/")[0]), None)
    if word is not None and "," not in word:  # as it was written: Hydra has read a path in it
        group, choice = group.split("/")[0], word.partition("=")[2]
    options = sorted(error.options)
    off = "; without vision: fusion=none" if choice == "none" and group in ("encoder", "connector") else ""
    return (
        f"{group} has no choice {shown(choice)!r}{closest(choice, options)}: choose one of {listed(options, 200)}{off}"
    )


def _composition(error: ConfigCompositionException, conf: Path, config_name: str, words: Sequence[str]) -> str:
    text = str(error)
    named = re.search(r"Could not (?:override|append to config|delete from config|delete)[.:]? ?'([^'@]+)", text)
    if named is None and text.startswith("Ambiguous value"):
        return f"{_first(error)}: add -m to sweep over its values, write [a,b] for a list, or quote a text with a comma"
    if named is None and (swept := re.match(r"Sweep parameters '(.*)' requires --multirun", text, re.DOTALL)):
        return f"{shown(swept.group(1), 120)} gives several values to one run; add -m to sweep over them, or give one"
    if named is None and (twice := re.match(r"(\S+) appears more than once in the final defaults list", text)):
        return f"{twice.group(1)} is chosen already and cannot be added; write {twice.group(1)}=... to change it"
    if named is None:
        cause = error.__cause__
        why = _first(error) + (f" ({_first(cause)})" if cause is not None else "")
        return _no_choice(words, conf) or f"{why}; give it another value, or leave it out"
    key = named.group(1)
    if key.startswith(("hydra.launcher.", "hydra.sweeper.")):
        return f"no key {key!r} here; without -m, --cfg hydra shows those of the launcher and sweeper that are chosen"
    if key in INSIDE:
        return _inside(key, conf, config_name, words)
    if "@" in (word := text[named.start(1) :].partition("'")[0]):
        return _elsewhere(word, words)
    if (inside := re.search(r"full_key: (\S+)", str(error.__cause__))) and inside.group(1).startswith(f"{key}."):
        key = inside.group(1)
    if "No match in the defaults list" in text and (flags := _flags(words)):
        return f"no group {key!r} in the defaults of {flags}; leave out the one or the other"
    if "No match in the defaults list" in text and (conf / key).is_dir():
        if config_name != COMPOSED:
            return f"{key} is chosen when a run is trained and is not a key of {config_name}; leave it out"
        return f"{key} has no choice that could be changed; write +{key}=... to add one"
    if "not a ConfigGroup" in text or "already at" in text or "nvalid type" in text or key.startswith("hydra"):
        return _first(error)
    if isinstance(error.__cause__, OmegaConfBaseException) and "is not in struct" not in str(error.__cause__):
        return f"{key}: {_first(error.__cause__)}"
    groups, cfg = _known(conf, config_name, words)
    known = [*dict.fromkeys([*(groups if config_name == COMPOSED else ()), *_keys(cfg)])]
    if key in known:
        return f"{key}: {_first(error)}"
    return (
        f"{key} is not in the composition and may be added: write +{key}=..." if takes(cfg, key) else unread(key, known)
    )


def _elsewhere(word: str, words: Sequence[str]) -> str:
    """A group that is chosen for a place where the composition has none of it."""
    (group, _, place), typed = word.partition("@"), next((typed for typed in words if word in typed), word)
    value = typed.partition("=")[2]
    return (
        f"{shown(typed, 100)} finds no {group} at {shown(place)!r} to change; write {group}={value} for the run's own, "
        f"or +{word}={value} where a key takes one"
    )


def _inside(group: str, conf: Path, config_name: str, words: Sequence[str]) -> str:
    """Where a group that is used inside other choices is chosen, in what the words make; or what has a place for it."""
    word = next((word.lstrip("+~") for word in words if word.lstrip("+~").startswith(group)), group)
    choice = word.partition("=")[2] or "..."
    keys = [key for key in _keys(_known(conf, config_name, words)[1]) if key.endswith(".sees")]
    if keys:
        return f"{word} is not said where it belongs; write {' '.join(f'{group}@{key}={choice}' for key in keys)}"
    files = sorted(conf.glob("*/*.yaml"))
    able = [f"{file.parent.name}={file.stem}" for file in files if _takes_in(file, group)]
    return (
        f"{word} has no place in this composition; choose {' or '.join(able)}, whose memory mask it is, and write "
        f"{group}@fusion.sees={choice}"
    )


def _takes_in(file: Path, group: str) -> bool:
    """Whether a choice, or one of its own group that it inherits from, takes in a choice of this group."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    bases = re.findall(r"^  - (\w+)$", text, re.MULTILINE)
    return f"/{group}@" in text or any(_takes_in(file.parent / f"{base}.yaml", group) for base in bases)


def _known(conf: Path, config_name: str, words: Sequence[str]) -> tuple[list[str], DictConfig]:
    """The groups, and the composition of the choices that the words make, of a sweep the first."""
    groups = [folder.name for folder in conf.iterdir() if folder.is_dir()]
    pairs = [word.partition("=")[::2] for word in words]
    chosen = [f"{group}={value.split(',')[0]}" for group, value in pairs if group in groups and group not in INSIDE]
    return groups, _composed(conf, config_name, chosen)


def _composed(conf: Path, config_name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            return compose(config_name=config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException):
        return _composed(conf, config_name, []) if overrides else OmegaConf.create()


def takes(cfg: DictConfig, key: str) -> bool:
    """Whether something would read a key that is not in the configuration."""
    above, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, above, throw_on_missing=False) if above else cfg
    if re.fullmatch(r"recipe\.stages\.\w+", above) and isinstance(node, DictConfig):
        return last in KEYS
    if isinstance(node, DictConfig) and class_of(node):
        return last in keys_in(class_of(node))
    return False


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        name = f"{prefix}{key}"
        yield name
        node = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        if isinstance(node, DictConfig):
            yield from _keys(node, name + ".")

"""Hydra's and OmegaConf's composition errors, each as one sentence with the choices or the closest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

INSIDE = ("memory_mask",)
"""Groups that no run has at the top: the files of other groups take a choice of them into one of their keys."""


def explain(error: Exception, conf: Path, config_name: str, words: Sequence[str]) -> str | None:
    """What is wrong and what to write instead, or None for an error that is none of composition.

    Args:
        error: what Hydra raised.
        conf: the configuration folder.
        config_name: the primary configuration.
        words: of the command line; a misspelt key is compared with the keys of the choices that they make.
    """
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        hint = "quote special characters, as in 'key=\"a=b,c\"'"
        return f"the override {error.override!r} cannot be read: {_first(error)}; {hint}"
    if isinstance(error, ConfigCompositionException):
        return _composition(error, conf, config_name, words)
    if isinstance(error, OmegaConfBaseException):
        key = getattr(error, "full_key", None) or "a value"
        return f"{key} cannot be resolved: {_first(error)}"
    return _first(error) if isinstance(error, HydraException) else None


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _missing(error: MissingConfigException) -> str:
    file = str(error.missing_cfg_file or "")
    group, _, choice = file.rpartition("/")
    if not group or not error.options:
        return _first(error)
    options = sorted(error.options)
    off = "; without vision: fusion=none" if choice == "none" and group in ("encoder", "connector") else ""
    return f"{group} has no choice {choice!r}{_closest(choice, options)}: choose one of {', '.join(options)}{off}"


def _composition(error: ConfigCompositionException, conf: Path, config_name: str, words: Sequence[str]) -> str:
    text = str(error)
    named = re.search(r"Could not (?:override|append to config|delete from config|delete)[.:]? ?'([^'@]+)", text)
    if named is None and text.startswith("Ambiguous value"):
        return f"{_first(error)}: add -m to sweep over its values, write [a,b] for a list, or quote a text with a comma"
    if named is None:
        cause = error.__cause__
        return _first(error) + (f" ({_first(cause)})" if cause is not None else "")
    key = named.group(1)
    if key in INSIDE:
        return _inside(key, conf, config_name, words)
    if "not a ConfigGroup" in text or "already at" in text or "nvalid type" in text or key.startswith("hydra"):
        return _first(error)
    if isinstance(error.__cause__, OmegaConfBaseException) and "is not in struct" not in str(error.__cause__):
        return f"{key}: {_first(error.__cause__)}"
    known = _known_keys(conf, config_name, words)
    if key in known:
        return _first(error)
    return f"no key {key!r} in the configuration{_closest(key, known)}; see --cfg job, or add a new one by +{key}=..."


def _inside(group: str, conf: Path, config_name: str, words: Sequence[str]) -> str:
    """Where a group that stands inside other choices is chosen, in what the words make; or what has a place for it."""
    word = next((word.lstrip("+~") for word in words if word.lstrip("+~").startswith(group)), group)
    choice = word.partition("=")[2] or "..."
    keys = [key for key in _known_keys(conf, config_name, words) if key.endswith(".sees")]
    if keys:
        return f"{word} is not said where it belongs; write {' '.join(f'{group}@{key}={choice}' for key in keys)}"
    files = sorted(conf.glob("*/*.yaml"))
    able = [f"{file.parent.name}={file.stem}" for file in files if f"/{group}@" in file.read_text(encoding="utf-8")]
    return (
        f"{word} has no place in this composition; choose {' or '.join(able)}, whose memory mask it is, and write "
        f"{group}@fusion.sees={choice}"
    )


def _closest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # the right last part in the wrong place
        close = [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2]][:2]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _known_keys(conf: Path, config_name: str, words: Sequence[str]) -> list[str]:
    """The groups, and all keys under the choices that the words make, of a sweep the first."""
    groups = [folder.name for folder in conf.iterdir() if folder.is_dir()]
    pairs = [word.partition("=")[::2] for word in words]
    chosen = [f"{group}={value.split(',')[0]}" for group, value in pairs if group in groups and group not in INSIDE]
    return [*dict.fromkeys([*groups, *_composed(conf, config_name, chosen)])]


def _composed(conf: Path, config_name: str, overrides: list[str]) -> list[str]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            return [*_keys(compose(config_name=config_name, overrides=overrides))]
    except (HydraException, OmegaConfBaseException):
        return _composed(conf, config_name, []) if overrides else []


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        name = f"{prefix}{key}"
        yield name
        node = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        if isinstance(node, DictConfig):
            yield from _keys(node, name + ".")

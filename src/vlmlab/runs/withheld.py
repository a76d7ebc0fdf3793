"""Values that come from the environment: a run's files name the variable in the place of the value.

Where a configuration says ``${oc.env:NAME}``, ``config.yaml`` says so too, and ``env.json`` has a salted hash of the
text that stood for it, so that the same command is still the same run and another value is another one. Numbers that
are decoded from a variable are written as numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmlab.runs.config import leaves, plain

KEY = "environment"
"""Of ``env.json``: dotted key -> mark of the value it had."""

RESOLVERS = ("oc.env:", "oc.decode:", "oc.create:")
"""What reads the environment, and what reads text as a configuration again."""

REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(?:,([^{}$,]*))?\}")


def literal(text: str) -> str:
    """The text as OmegaConf has to be given it to take no reference for one."""
    return re.sub(r"(\\*)\$\{", lambda found: found.group(1) * 2 + r"\${", text)


def stored(cfg: DictConfig, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plain configuration as it may be written down.

    Args:
        cfg: the composed configuration.
        config: the same as plain values, where they are known.
    """
    known = plain(cfg) if config is None else dict(config)
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    raw.pop("hydra", None)
    written = {str(key): value for key, value in raw.items()}
    if not any(isinstance(value, str) and RESOLVERS[0] in value for _, value in leaves(written, deep=True)):
        return known
    merged: dict[str, Any] = _merged(known, plain(OmegaConf.create(_masked(written))))
    return merged


def _masked(raw: Any) -> Any:
    if isinstance(raw, Mapping):
        return {key: _masked(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_masked(value) for value in raw]
    return literal(raw) if isinstance(raw, str) and any(name in raw for name in RESOLVERS) else raw


def _merged(known: Any, masked: Any) -> Any:
    if isinstance(known, dict) and isinstance(masked, dict):
        return {key: _merged(value, masked.get(key, value)) for key, value in known.items()}
    if isinstance(known, list) and isinstance(masked, list) and len(known) == len(masked):
        return [_merged(one, other) for one, other in zip(known, masked, strict=True)]
    return masked if isinstance(known, str | dict | list) else known


def marks(written: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, str]:
    """The mark of every value that is withheld, by its dotted key."""
    return {key: _mark(value, secrets.token_hex(8)) for key, value in _withheld(written, known, "")}


def _withheld(written: Any, known: Any, where: str) -> Iterator[tuple[str, Any]]:
    for key, text in _items(written):
        value = dict(_items(known)).get(key)
        if isinstance(text, str) and text != value:
            yield f"{where}{key}", value
        yield from _withheld(text, value, f"{where}{key}.")


def _items(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    return [(str(index), value) for index, value in enumerate(node)] if isinstance(node, list) else []


def filled(written: Any, given: Any, known: Mapping[str, Any], where: str = "") -> Any:
    """What a run's file says, with a given configuration's values where they are the ones that were withheld.

    Args:
        written: the file's configuration.
        given: another one, with all its values.
        known: the marks.
        where: dotted key of both, with a dot at its end.
    """
    there = dict(_items(given))
    if isinstance(written, Mapping):
        return {k: filled(v, there.get(str(k)), known, f"{where}{k}.") for k, v in written.items()}
    if isinstance(written, list):
        return [filled(v, there.get(str(i)), known, f"{where}{i}.") for i, v in enumerate(written)]
    return given if isinstance(written, str) and fits(known.get(where[:-1]), given) else written


def present(text: str) -> str | None:
    """What a text that names variables comes to in this environment; None where one is not set, or it names more."""
    found = REFERENCE.findall(text)
    if not found or "${" in REFERENCE.sub("", text) or any(name not in os.environ and not or_ for name, or_ in found):
        return None
    return REFERENCE.sub(lambda one: os.environ.get(one.group(1), (one.group(2) or "").strip()), text)


def fits(mark: Any, value: Any) -> bool:
    """Whether a mark is of this value."""
    return isinstance(mark, str) and ":" in mark and _mark(value, mark.partition(":")[0]) == mark


def _mark(value: Any, salt: str) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return f"{salt}:{hashlib.sha256(f'{salt}{text}'.encode()).hexdigest()[:32]}"


def hidden(value: Any, written: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """Plain values for people to read, with the name of the variable in place of every value that is withheld."""
    names = {text: value for value, text in ((dict(leaves(written, deep=True)).get(k), v)
             for k, v in _withheld(written, known, "")) if isinstance(text, str)}  # fmt: skip
    return _renamed(value, names) if names else value


def _renamed(value: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value

"""What is wrong with the words of a command before Hydra composes them: its options, and keys of Hydra's own."""

from __future__ import annotations

import contextlib
import io
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from vlmlab.contracts.values import Count, Natural, Positive, Text, refusal, shown

RUN: Mapping[str, Any] = {"hydra.run.dir": str}
"""Hydra's own keys that a single run reads."""

SWEEP: Mapping[str, Any] = {
    "hydra.sweep.dir": str,
    "hydra.sweep.subdir": str,
    "hydra.launcher.slots": Count | None,
    "hydra.launcher.timeout": Positive | None,
    "hydra.launcher.record": Text | None,
    "hydra.launcher.devices_per_cell": Count | None,
    "hydra.launcher.retries": Natural,
    "hydra.launcher.backoff": Positive,
    "hydra.launcher.stalled": Positive | None,
    "hydra/launcher": str,
    "hydra/sweeper": str,
    "hydra.sweeper.params": dict,
}
"""Those that a sweep reads."""

ANY: Mapping[str, Any] = {"hydra.searchpath": list, "hydra.mode": str, "hydra/help": str}
"""Those that every command reads."""


def wrong_word(words: Sequence[str], trains: bool) -> str | None:
    """The first word that cannot work, in one sentence; what follows a ``=`` of ours is composed first.

    Args:
        words: of the command line.
        trains: whether the command makes run folders, and several with ``-m``.
    """
    return next(_wrong_words(words, trains), None)


def overrides_of(words: Sequence[str]) -> list[str]:
    """The words that are neither options nor values of options, in their order."""
    parsed, _ = _parsed(words)
    return [] if parsed is None else list(parsed.overrides)


def package_of(words: Sequence[str]) -> str | None:
    """The part of the configuration that ``--package`` asks ``--cfg`` to print."""
    parsed, _ = _parsed(words)
    return None if parsed is None else parsed.package


def _parsed(words: Sequence[str]) -> tuple[Namespace | None, str]:
    """What Hydra's parser makes of the words; or nothing, and why in its own words: none where it printed its help."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            found, unknown = get_args_parser().parse_known_args(list(words))
        except SystemExit:
            return None, " ".join(said.getvalue().strip().rpartition("error: ")[2].split())
    found.unknown = unknown
    return found, ""


def _wrong_words(words: Sequence[str], trains: bool) -> Iterator[str]:
    parsed, why = _parsed(words)
    if parsed is None:
        if why:
            yield f"{why}; --help shows the options"
        return
    yield from _wrong_options(words, parsed)
    several = parsed.multirun or any(re.fullmatch(r"hydra\.mode=MULTIRUN", word) for word in parsed.overrides)
    if several and not trains:
        yield "-m is for several trainings and this command looks at one; leave -m out and give one value a key"
    for word in parsed.overrides:
        if not re.match(r"\s*[+~]*[^\s=+~]", word):
            yield f"{shown(word)!r} has no key; write key=value"
        if "=" not in word and not word.lstrip().startswith("~"):
            yield f"{shown(word)!r} has no value; write key=value"
        key = re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0]
        if re.match(r"hydra\b", key) and not _of_another(key, parsed.overrides):
            yield from _wrong_setting(word, key, trains)


def _wrong_options(words: Sequence[str], parsed: Namespace) -> Iterator[str]:
    for word in parsed.unknown:
        if word.startswith("-"):
            yield f"{word} is not an option; --help shows the groups, keys are given as key=value"
        yield f"{word} comes after an option that has keys before it; give the options first"
    if "--" in words:
        yield "-- is not an option; leave it out"
    if parsed.experimental_rerun is not None:
        yield f"--experimental-rerun={parsed.experimental_rerun} has no effect here; write the command again"
    asked = ("run", "multirun", "cfg", "info", "shell_completion")
    if len(given := [f"--{name.replace('_', '-')}" for name in asked if getattr(parsed, name)]) > 1:
        yield f"{' and '.join(given)} cannot be asked together; give one of them"
    if parsed.cfg is None and (parsed.package or parsed.resolve):
        alone = f"--package {parsed.package}" if parsed.package else "--resolve"
        yield f"{alone} is about what --cfg prints and has no effect alone; add --cfg job"


def other_kind(words: Sequence[str], several: bool) -> str | None:
    """A key of Hydra's that a sweep reads and a single run does not, or the other way round.

    Args:
        words: those of the command line.
        several: whether it is a sweep, which a choice may say too.
    """
    for word in words:
        key = re.split(r"[=@]", word.lstrip("+~"), maxsplit=1)[0]
        if (_known(key, SWEEP) or key == "sweep") and not several:
            return f"{shown(word)} is of a sweep; add -m, or leave it out"
        if key in RUN and several:
            return f"{shown(word)} is of a single run; give hydra.sweep.dir=... to a sweep"
    return None


def _known(key: str, keys: Mapping[str, Any]) -> bool:
    """Whether a key is one of these, or is in a mapping that is one of them."""
    return any(key == known or (kind is dict and key.startswith(f"{known}.")) for known, kind in keys.items())


def _of_another(key: str, words: Sequence[str]) -> bool:
    """Whether a key is of a launcher or sweeper from elsewhere that the command chooses, and that knows its own."""
    group = key.split(".")[1] if key.count(".") > 1 else ""
    if group not in ("launcher", "sweeper"):
        return False
    chosen = [word for word in words if word.startswith((f"hydra/{group}=", "sweep="))]
    return bool(chosen) and not {"hydra/launcher=pool", "sweep=pool"} & {*chosen}


def _wrong_setting(word: str, key: str, trains: bool) -> Iterator[str]:
    """Hydra has keys for everything; refused are those that nothing here reads."""
    known = {**ANY, **RUN, **SWEEP} if trains else dict(ANY)
    if not _known(key, known) or word.startswith("~") or "@" in word.partition("=")[0]:
        read = ", ".join(_together(name for name in known if name not in ("hydra.mode", "hydra/help")))
        yield f"{shown(word)} would have no effect; of Hydra's own keys this command reads {read}"
        return
    try:
        parsed = OverridesParser.create().parse_override(word)
    except OverrideParseException:  # Hydra says so
        return
    if key in known and not parsed.is_sweep_override():
        yield from _wrong_value(key, known[key], parsed)


def _together(names: Iterable[str]) -> list[str]:
    """Names with those below one key as one: ``hydra.sweep.dir|subdir``."""
    below: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        below.setdefault(parent if "." in parent else name, []).append(last)
    return [
        name if lasts == [name.rpartition(".")[2]] else f"{name}.{'|'.join(lasts)}" for name, lasts in below.items()
    ]


def _wrong_value(key: str, kind: Any, parsed: Override) -> Iterator[str]:
    value = parsed.value()
    if key.endswith("dir") and (not isinstance(value, str) or not value):
        yield f"{key}={shown(value)} is not a folder; give one, or leave it out and give name=..."
    elif kind is list:
        for place in value if isinstance(value, list) else [value]:
            path = str(place).removeprefix("file://")
            if "://" not in path and not Path(path).is_dir():
                yield f"{key} has {shown(path)}, which is not a folder; give a list of those that have config groups"
    elif kind is not str and kind is not dict:  # Hydra knows the choices
        sentence = refusal(kind, value, key)
        if sentence is not None:
            yield sentence

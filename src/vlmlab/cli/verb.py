"""Verbs that compose a training's configuration and have a few keys of their own beside it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import MISTAKE, fail, guard, run_command
from vlmlab.cli.flags import overrides_of, wrong_word
from vlmlab.cli.rules.values import given_twice
from vlmlab.runs import places as places  # registers the resolvers that conf/train.yaml uses
from vlmlab.runs.names import override_key

TOP = "train"

ONE_RUN = ("hydra.run.dir=.", "hydra.mode=RUN")
"""No folder of its own, and no sweep where a choice says one: an experiment is looked at as its first composition."""


def run_verb(verb: str, task: Callable[[DictConfig], object], more: Sequence[str] = ()) -> int:
    """Compose ``conf/train.yaml`` with the keys of ``conf/<verb>.yaml`` and call the task; no run folder is made.

    Args:
        verb: its name; ``conf/hydra/help/<verb>.yaml`` is its help.
        task: what it does with the configuration.
        more: words that are put before those that were typed.

    Returns:
        The exit code.
    """
    conf = conf_folder()
    if (sentence := wrong_word(sys.argv[1:], trains=False)) is not None:
        return fail(sentence, MISTAKE)
    for sentence in given_twice(overrides_of(sys.argv[1:])):  # a second value replaces the one that the verb adds
        return fail(sentence, MISTAKE)
    sys.argv[1:] = arguments(verb, sys.argv[1:], own_keys(verb), more=more)
    main = hydra.main(config_path=str(conf), config_name=TOP, version_base="1.3")(guard(task))
    return run_command(main, conf, TOP)


def run_cells(verb: str, words: Sequence[str]) -> int:
    """Compose the cells of a sweep with the keys of ``conf/<verb>.yaml`` for a launcher that trains nothing.

    Returns:
        The exit code.
    """
    for sentence in given_twice(overrides_of(words)):
        return fail(sentence, MISTAKE)
    given = {override_key(word).split(".")[0] for word in overrides_of(words)}
    left = {key: value for key, value in own_keys(verb).items() if key not in given}  # a key is swept by one word
    found = arguments(verb, words, own_keys(verb), [*(f"++{key}={_written(value)}" for key, value in left.items())])
    return compose_cells(lambda sweep: [*found, *launcher(verb, sweep)])


def compose_cells(launched: Callable[[Path], Sequence[str]]) -> int:
    """Call Hydra with the words of a sweep whose launcher trains nothing; the exit code.

    Args:
        launched: the words, for the folder that Hydra writes into before it asks the launcher.
    """
    conf = conf_folder()

    def task(cfg: DictConfig) -> None:
        raise AssertionError("the launcher runs no cell")

    main = hydra.main(config_path=str(conf), config_name=TOP, version_base="1.3")(guard(task))
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            sys.argv[1:] = launched(Path(folder) / "sweep")
            main()

        return run_command(run, conf, TOP)


def launcher(name: str, sweep: Path) -> list[str]:
    """The words for Hydra by which this launcher gets the cells."""
    return [f"hydra/launcher={name}", f"hydra.sweep.dir={quoted(str(sweep))}"]


def quoted(text: str) -> str:
    """A text as a value for Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def own_keys(verb: str) -> dict[str, Any]:
    """The keys at the top that a verb has beside those of a run, with their values."""
    own = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{verb}.yaml"))
    assert isinstance(own, dict)
    return {str(key): value for key, value in own.items()}


def arguments(
    verb: str,
    words: Sequence[str],
    own: Mapping[str, Any],
    before: Sequence[str] | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The words for Hydra: the verb's own keys are added with their values, and may then be given like any other.

    They are put before the user's keys and options where they were, since Hydra takes no keys on both sides of one.

    Args:
        verb: its name.
        words: as typed.
        own: its own keys and their values.
        before: other words for its own keys and for what kind of run it is.
        more: words of the composition that are put before those that were typed.
    """
    if before is None:
        before = [*ONE_RUN, *(f"++{key}={_written(value)}" for key, value in own.items())]
    typed = overrides_of(words)
    given = [_added(word) if override_key(word).split(".")[0] in own and "=" in word else word for word in typed]
    place = next(i for i in range(len(words) + 1) if list(words[i : i + len(typed)]) == typed) if typed else len(words)
    return [*words[:place], f"hydra/help={verb}", *before, *more, *given, *words[place + len(typed) :]]


def _added(word: str) -> str:
    return "++" + word.lstrip("+")


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""Verbs that compose a training's configuration and have a few keys of their own beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import MISTAKE, ConfigError, fail, guard, run_command
from vlmlab.runs import places as places  # registers the resolvers that conf/train.yaml uses
from vlmlab.runs.names import override_key

TOP = "train"


def run_verb(verb: str, task: Callable[[DictConfig], object]) -> int:
    """Compose ``conf/train.yaml`` with the keys of ``conf/<verb>.yaml`` and call the task; no run folder is made.

    Args:
        verb: its name; ``conf/hydra/help/<verb>.yaml`` is its help.
        task: what it does with the configuration.

    Returns:
        The exit code.
    """
    conf = conf_folder()
    if any(word in ("-m", "--multirun") for word in sys.argv[1:]):
        return fail(f"vlmlab {verb} looks at one composition; leave out {'-m'} and give one value a key", MISTAKE)
    sys.argv[1:] = arguments(verb, sys.argv[1:], own_keys(verb))
    main = hydra.main(config_path=str(conf), config_name=TOP, version_base="1.3")(guard(task))
    return run_command(main, conf, TOP)


def own_keys(verb: str) -> dict[str, Any]:
    """The keys at the top that a verb has beside those of a run, with their values."""
    own = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{verb}.yaml"))
    assert isinstance(own, dict)
    return {str(key): value for key, value in own.items()}


def arguments(verb: str, words: Sequence[str], own: Mapping[str, Any]) -> list[str]:
    """The words for Hydra: the verb's own keys are added with their values, and may then be given like any other."""
    before = [f"++{key}={_written(value)}" for key, value in own.items()]
    given = [_added(word) if override_key(word).split(".")[0] in own and "=" in word else word for word in words]
    flags = [word for word in given if word.startswith("-")]
    return [*flags, f"hydra/help={verb}", "hydra.run.dir=.", *before, *(w for w in given if not w.startswith("-"))]


def _added(word: str) -> str:
    return "++" + word.lstrip("+")


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def count(cfg: DictConfig, key: str, least: int) -> int:
    """A key of the verb's own that is a whole number.

    Raises:
        ConfigError: it is none, or smaller than `least`.
    """
    value = cfg[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value} is not possible; give a whole number of at least {least}")
    return value

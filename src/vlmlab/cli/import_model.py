"""The import command: ``vlmlab import path=... to=...`` makes a run of a published model of transformers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.entry import ConfigError, exit_code, fail
from vlmlab.cli.flags import overrides_of
from vlmlab.cli.rules import admitted
from vlmlab.cli.rules.schema import Import
from vlmlab.cli.verb import own_keys, run_verb
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.terminal import tell
from vlmlab.contracts.values import hints, refusal
from vlmlab.runs.files import is_free
from vlmlab.runs.names import override_key

if TYPE_CHECKING:
    from vlmlab.published.model import Found

VERB = "import"
EXAMPLE = "vlmlab import path=llava-1.5-7b-hf to=outputs/llava"
FREE = ("mask",)
"""Groups that the published model decides and that may be another: the same weights under another mask."""


def import_run(words: Sequence[str]) -> int:
    """Look at the model, compose what it is, and write the run; the exit code."""
    typed = overrides_of(words)
    if not typed or any(word in words for word in ("--help", "-h", "--hydra-help")):
        return run_verb(VERB, _ask)
    try:
        own = _own(typed)
        to = _place(own)
        from vlmlab.published.model import find  # from here on torch

        found = find(own["path"], own["chat_template"], own["image_size"])
        more = _more(found, to, typed)
    except UserError as error:
        return fail(str(error), exit_code(error))

    def task(cfg: DictConfig) -> None:
        import_command(cfg, found, to, [*more, *_of_the_run(typed)])

    return run_verb(VERB, task, more)


def import_command(cfg: DictConfig, found: Found, to: Path, words: Sequence[str]) -> None:
    """Write the run, and say how to go on with it.

    Raises:
        ConfigError: the composition breaks a rule.
        UserError: the model cannot be taken apart.
    """
    admitted(cfg, HydraConfig.get(), Import)
    run = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in (*own_keys(VERB), "hydra")])
    OmegaConf.copy_cache(cfg, run)
    from vlmlab.published.split import split_model

    result = split_model(found, run, to, words)
    for note in found.notes:
        tell(f"note: {note}")
    tell(f"{found.plan.model.__name__}, {result['cost']['params']:,} parameters: {to}\n")
    tell(f"  python evaluate.py run={to}")
    fixed = shlex.join(word for word in words if override_key(word) not in ("recipe", "adapter", "fusion"))
    tell(f"  python train.py init_from={to} {fixed} recipe=... name=...")


def _ask(cfg: DictConfig) -> None:
    raise ConfigError(f"which model? write path=<folder or hub id>, as in: {EXAMPLE}")


def _own(typed: Sequence[str]) -> dict[str, Any]:
    """The verb's own keys among the words.

    Raises:
        ConfigError: one is missing or cannot have its value.
    """
    own = own_keys(VERB)
    for word in typed:
        if (key := override_key(word)) in own:
            try:
                own[key] = OverridesParser.create().parse_override(word.lstrip("+~")).value()
            except OverrideParseException as error:
                raise ConfigError(f"{word!r} cannot be read; quote the value, as in {key}='...'") from error
    for key, kind in hints(Import).items():
        if own[key] is None and key in ("path", "to"):
            raise ConfigError(f"{key} is needed; write {key}=..., as in: {EXAMPLE}")
        if (sentence := refusal(kind, own[key], key)) is not None:
            raise ConfigError(sentence)
    return own


def _place(own: dict[str, Any]) -> Path:
    to = Path(str(own["to"])).expanduser().absolute()
    if not is_free(to):
        raise ConfigError(f"to={own['to']} has files in it; give a new or empty folder")
    return to


def _more(found: Found, to: Path, typed: Sequence[str]) -> list[str]:
    """The words that compose the published model, but for those of which another was given.

    Raises:
        ConfigError: a word says something that the published model decides.
    """
    given = {override_key(word) for word in typed}
    words = found.words(to)
    for key in (override_key(word) for word in words):
        if key in given and key not in FREE:
            raise ConfigError(f"{key}=... is decided by the published model; leave it out")
    if "preset" in given:
        raise ConfigError("preset=... composes another model than the published one; leave it out")
    return [word for word in words if override_key(word) not in given]


def _of_the_run(typed: Sequence[str]) -> list[str]:
    own = own_keys(VERB)
    return [word for word in typed if override_key(word) not in own]


if __name__ == "__main__":
    sys.exit(import_run(sys.argv[1:]))

"""How a command ends: quietly, or with one sentence on stderr and an exit code."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vlmlab.contracts.errors import UserError, mistake_within
from vlmlab.contracts.faults import machine_error, unusable

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: fine; the run, its data or the machine; the command or the configuration; stopped by Ctrl-C (by another
signal: 128 and its number)."""


LONGEST = 300
"""Characters of a sentence."""


class ConfigError(UserError):
    """The command or the composition cannot work; exit code 2."""


def debugging() -> bool:
    """Whether ``VLMLAB_DEBUG=1`` asks for whole tracebacks."""
    return os.environ.get("VLMLAB_DEBUG") == "1"


def one_line(text: str) -> str:
    """The text without its line breaks, since what libraries say inside a sentence may have some."""
    return " ".join(text.split())


def short(sentence: str, most: int = LONGEST) -> str:
    """The sentence without its middle where it is too long: what is wrong stands first and what to do stands last."""
    return sentence if len(sentence) <= most else f"{sentence[: most - 125]} ... {sentence[-120:]}"


def fail(sentence: str, code: int) -> int:
    """Print ``error: sentence`` on stderr, in one line, and return the code."""
    print(f"error: {short(one_line(sentence))}", file=sys.stderr, flush=True)
    return code


def guard(task: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """A Hydra task that ends the process itself on a user's mistake, before Hydra adds its own lines."""

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except KeyboardInterrupt as error:
            raise SystemExit(INTERRUPTED) from error
        except Exception as error:
            if debugging():
                raise
            sentence = said(error)
            if sentence is not None:
                raise SystemExit(fail(sentence, MISTAKE if isinstance(error, ConfigError) else FAILED)) from error
            traceback.print_exc()  # a fault of ours: all of it, and none of Hydra's own lines
            raise SystemExit(FAILED) from error

    return guarded


def said(error: Exception) -> str | None:
    """One sentence about what the user, the data or the machine is to blame for; None for a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if (refused := machine_error(error)) is not None:
        return str(refused)
    if isinstance(error, InstantiationException):
        return unbuildable(error)
    return unusable(error) if isinstance(error, OSError) else None


def unbuildable(error: InstantiationException) -> str:
    """The user's mistake behind a part that could not be built; or which part, why, and where its keys are."""
    mistake = mistake_within(error)
    if mistake is not None:
        return str(mistake)
    text = str(error)
    place, target = (re.search(pattern, text) for pattern in (r"full_key: (\S+)", r"target '([^']+)'"))
    where = place.group(1) if place else (target.group(1) if target else "a part")
    cause = error.__cause__
    if cause is None or text.startswith("Error locating target"):
        shown = target.group(1) if target else ""
        return f"{where}._target_={shown} cannot be imported; give the dotted path of a class that is installed"
    why = one_line(str(cause)) or type(cause).__name__
    return f"{where} cannot be built ({why}); correct its keys, VLMLAB_DEBUG=1 shows the whole traceback"


def run_command(main: Callable[[], object], conf: Path, config_name: str) -> int:
    """Call a function decorated by ``hydra.main`` and turn what composition raises into one sentence.

    Args:
        main: the decorated function; reads ``sys.argv``.
        conf: the configuration folder, to suggest keys from.
        config_name: the primary configuration, for the same.

    Returns:
        The exit code. A task wrapped by ``guard`` exits by itself.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    try:
        check_flags(sys.argv[1:])
        main()
    except UserError as error:
        if debugging():
            raise
        return fail(str(error), MISTAKE if isinstance(error, ConfigError) else FAILED)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        if debugging():
            raise
        if (told := said(error)) is not None:  # Hydra makes the folder before the task starts
            return fail(told, FAILED)
        from vlmlab.cli.explain import explain

        sentence = explain(error, conf, config_name, sys.argv[1:])
        if sentence is None:
            raise
        return fail(sentence, MISTAKE)
    finally:
        _forget_sweep()
    return DONE


def check_flags(words: Sequence[str]) -> None:
    """Refuse an option that Hydra does not have, which its own parser would answer with its whole usage.

    Raises:
        ConfigError: naming the option.
    """
    parser = get_args_parser()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            _, unknown = parser.parse_known_args(list(words))
        except SystemExit as end:
            if not end.code:
                return
            why = said.getvalue().strip().rpartition("error: ")[2]
            raise ConfigError(f"{one_line(why)}; --help shows the options") from end
    for word in unknown:
        if word.startswith("-"):
            raise ConfigError(f"{word} is no option; --help shows the groups, keys are given as key=value")
        raise ConfigError(f"{word} stands behind an option that has keys before it; give the options first")


def _forget_sweep() -> None:
    """Hydra makes a sweep's folder with its ``multirun.yaml`` before it composes a cell; a refused one leaves none."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    try:
        folder = Path(str(HydraConfig.get().sweep.dir))
    except OmegaConfBaseException:  # it was never made
        return
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
        (folder / "multirun.yaml").unlink(missing_ok=True)
        remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Remove an empty folder; of a relative one also those that it stands in."""
    for place in (folder,) if folder.is_absolute() else (folder, *folder.parents):
        if place != Path():
            with contextlib.suppress(OSError):
                place.rmdir()

"""How a command ends: quietly, or with one sentence on stderr and an exit code."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vlmlab.cli.flags import package_of, wrong_word
from vlmlab.contracts.errors import InUse, UserError, brief, unbuildable
from vlmlab.contracts.faults import machine_error, unusable
from vlmlab.contracts.terminal import tell, visible
from vlmlab.runs.watchdog import is_further_rank

DONE, FAILED, MISTAKE, IN_USE, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: fine; the run, its data or the machine; the command or the configuration; the folder is another process's
for now (as sendmail's EX_TEMPFAIL); stopped by Ctrl-C (by another signal: 128 and its number)."""


class ConfigError(UserError):
    """The command or the composition cannot work; exit code 2."""


def debugging() -> bool:
    """Whether ``VLMLAB_DEBUG=1`` asks for whole tracebacks."""
    return os.environ.get("VLMLAB_DEBUG") == "1"


def one_line(text: str) -> str:
    """The text without its line breaks, since what libraries say inside a sentence may have some."""
    return " ".join(text.split())


def fail(sentence: str, code: int) -> int:
    """Print ``error: sentence`` on stderr, in one line, and return the code."""
    tell(f"error: {brief(visible(one_line(sentence)))}", sys.stderr)
    return code


def exit_code(error: UserError) -> int:
    """What a command ends with after this mistake."""
    if isinstance(error, ConfigError):
        return MISTAKE
    return IN_USE if isinstance(error, InUse) else FAILED


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
            if (sentence := said(error)) is not None:
                code = exit_code(error) if isinstance(error, UserError) else FAILED
                raise SystemExit(fail(sentence, code)) from error
            tell(traceback.format_exc().rstrip(), sys.stderr)  # a fault of ours, and none of Hydra's own lines
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
        wrong = None if is_further_rank() else wrong_word(sys.argv[1:], trains=config_name == "train")
        if wrong is not None:  # a further rank is given keys of Hydra's own by Lightning
            return fail(wrong, MISTAKE)
        with _package_there() if package_of(sys.argv[1:]) else contextlib.nullcontext():
            main()
    except UserError as error:
        if debugging():
            raise
        return fail(str(error), exit_code(error))
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from here", sys.stderr)
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


@contextlib.contextmanager
def _package_there() -> Iterator[None]:
    """``--cfg job --package x`` makes Hydra end with a line of its own where there is no x; here with a sentence."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield
        except SystemExit as end:
            if end.code and "not found in config" in said.getvalue():
                why = one_line(said.getvalue()).removesuffix(" in config")
                raise ConfigError(f"--{why}, or null there; --cfg job without it shows all there is") from end
            raise
    sys.stderr.write(said.getvalue())


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
    """Remove an empty folder; of a relative one also its parents."""
    for place in (folder,) if folder.is_absolute() else (folder, *folder.parents):
        if place != Path():
            with contextlib.suppress(OSError):
                place.rmdir()

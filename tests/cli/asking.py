"""Asks the real commands in this process: a line as a user types it -> exit code, stdout, stderr."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.curate import curate_command
from vlmlab.cli.entry import guard, run_command
from vlmlab.cli.evaluate import evaluate_command
from vlmlab.cli.export import export_command
from vlmlab.cli.train import train_command
from vlmlab.cli.verb import run_verb

TASKS = {"train": train_command, "evaluate": evaluate_command, "export": export_command, "curate": curate_command}
VERBS = ("plan", "inspect")
Answer = tuple[int, str, str, float]


def ask(line: str) -> Answer:
    """``train a=b``, ``evaluate run=x``, ``export run=x to=y``, in the current folder; the last number: CPU seconds."""
    verb, *words = line.split(" ")
    return ask_words(verb, words, TASKS[verb])


def ask_words(verb: str, words: Sequence[str], task: Callable[[DictConfig], object]) -> Answer:
    """The same with the words as the shell gives them, and another task after the composition."""
    conf, before = conf_folder(), sys.argv
    sys.argv = [verb, *words]
    GlobalHydra.instance().clear()
    out, err, since = io.StringIO(), io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if verb in VERBS:
                code = run_verb(verb, task)
            else:
                main = hydra.main(config_path=str(conf), config_name=verb, version_base="1.3")(guard(task))
                code = run_command(main, conf, verb)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue(), time.process_time() - since


def outcome(
    command: Callable[[], int], verb: str, words: Sequence[str], patch: Any, capture: Any
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; `patch`, `capture`: pytest's ``monkeypatch`` and ``capsys``."""
    patch.setattr(sys, "argv", [verb, *words])
    GlobalHydra.instance().clear()
    try:
        code = command()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capture.readouterr()
    return code, out, err


if __name__ == "__main__":
    answers = {line: ask(line) for line in json.loads(sys.argv[1])}
    heavy = [name for name in ("torch", "transformers", "lightning", "matplotlib") if name in sys.modules]
    sys.stdout.write(json.dumps({"answers": answers, "heavy": heavy}))

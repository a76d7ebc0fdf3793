"""The console command ``vlmlab``: the verbs, each a module that is run in place of this process."""

from __future__ import annotations

import os
import sys

from vlmlab.cli.entry import DONE, MISTAKE, fail

VERBS = {
    "train": ["vlmlab.cli.train"],
    "sweep": ["vlmlab.cli.train", "--multirun"],
    "evaluate": ["vlmlab.cli.evaluate"],
}

USAGE = """usage: vlmlab train|sweep|evaluate [group=choice] [key=value] [--help] [--cfg job]

  vlmlab train                                            train and score the embedded default
  vlmlab sweep connector=mlp,qformer mask=bidir,causal    one process per cell, then the table
  vlmlab evaluate run=outputs/<name>                      score a finished run again
"""


def main(arguments: list[str] | None = None) -> int:
    """Replace this process by the verb's module, so that ranks and sweep cells are started in the same way."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return DONE
    if words[0] not in VERBS:
        return fail(f"vlmlab has no verb {words[0]!r}; choose one of {', '.join(VERBS)}", MISTAKE)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *VERBS[words[0]], *words[1:]])

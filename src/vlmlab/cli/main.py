"""The console command ``vlmlab``: the verbs, each a module that is run in place of this process."""

from __future__ import annotations

import difflib
import os
import sys

from vlmlab.cli.entry import DONE, MISTAKE, fail

VERBS = {
    "train": ["vlmlab.cli.train"],
    "sweep": ["vlmlab.cli.train", "--multirun"],
    "evaluate": ["vlmlab.cli.evaluate"],
    "inspect": ["vlmlab.cli.inspect"],
    "plan": ["vlmlab.cli.plan"],
    "cost": ["vlmlab.cli.cost"],
    "compare": ["vlmlab.cli.compare"],
    "generate": ["vlmlab.cli.generate"],
    "chat": ["vlmlab.cli.chat"],
    "demo": ["vlmlab.cli.demo"],
    "score": ["vlmlab.cli.score"],
    "export": ["vlmlab.cli.export"],
    "import": ["vlmlab.cli.import_model"],
    "curate": ["vlmlab.cli.curate"],
    "wandb": ["vlmlab.cli.wandb_sweep"],
}

LOOKS = {
    "show": ["vlmlab.cli.sweep", "show"],
    "table": ["vlmlab.cli.sweep", "table"],
    "report": ["vlmlab.cli.sweep", "report"],
    "compare": ["vlmlab.cli.compare"],
}
"""What follows ``vlmlab sweep`` where nothing is to be trained."""

USAGE = """usage: vlmlab <verb> [group=choice] [key=value] [--help]

  vlmlab train                                            train and score the embedded default
  vlmlab sweep connector=mlp,qformer mask=bidir,causal    one process per cell, then the table
  vlmlab sweep show sweeps/<name>                         states of its cells; likewise table, report, compare
  vlmlab evaluate run=outputs/<name>                      score a finished run again
  vlmlab inspect recipe=joint data=vqa data.path=a.json   a page of what the model will see, and what is wrong with it
  vlmlab plan preset=improved_alignment_900m device=h100  parameters, memory, FLOPs and hours; no weights are needed
  vlmlab cost -m fusion=concat,lavi images=1,5            what an answer costs: FLOPs, cache, added parameters
  vlmlab compare sweeps/<name> baseline=mlp,bidir         what a sweep has shown: differences, intervals, tests
  vlmlab generate run=outputs/<name> image=a.jpg "What?"  an answer of a finished run
  vlmlab chat run=outputs/<name> image=a.jpg              a conversation in the terminal
  vlmlab demo run=outputs/<a>,outputs/<b>                 one or two runs in a browser, with what they look at
  vlmlab score outputs/<name>                             the scores again, from the answers that the run keeps
  vlmlab export run=outputs/<name> to=<folder>            a finished run as a model of transformers, with its card
  vlmlab import path=<folder> to=outputs/<name>           a run of a published model: LLaVA, BLIP-2, PaliGemma ...
  vlmlab curate run=outputs/<name> out=<file>             how well captions fit their images, as a finished run finds
  vlmlab wandb sweeps/<name>                              a sweep's table and figure as an artifact at W&B
"""


def main(arguments: list[str] | None = None) -> int:
    """Replace this process by the verb's module, so that ranks and sweep cells are started in the same way."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return DONE
    if words[0] not in VERBS:
        return fail(_unknown(words), MISTAKE)
    sys.stdout.flush()
    verb, rest = VERBS[words[0]], words[1:]
    if words[0] == "sweep" and rest and rest[0] in LOOKS:
        verb, rest = LOOKS[rest[0]], rest[1:]
    elif words[0] == "sweep" and rest and "=" not in rest[0] and not rest[0].startswith(("-", "~")):
        return fail(f"vlmlab sweep has no {rest[0]!r}; choose {' or '.join(LOOKS)}, or give key=value", MISTAKE)
    os.execv(sys.executable, [sys.executable, "-m", *verb, *rest])


def _unknown(words: list[str]) -> str:
    """No such verb; where it was left out, the whole command is shown."""
    if "=" in words[0] or words[0].startswith("-"):
        verb = "sweep" if words[0] in ("-m", "--multirun") else "train"
        rest = " ".join(words[1:] if verb == "sweep" else words)
        return f"vlmlab wants a verb before {words[0]!r}; write vlmlab {verb} {rest}".rstrip()
    close = difflib.get_close_matches(words[0], VERBS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"vlmlab has no verb {words[0]!r}{hint}; choose one of {', '.join(VERBS)}"

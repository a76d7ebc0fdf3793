"""The score command: ``vlmlab score <run>`` computes a run's scores again from the answers that it keeps.

``vlmlab score <run>/predictions/<benchmark>.jsonl`` computes those of one benchmark.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from vlmlab.analyse.table import final_table
from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import guard, run_command
from vlmlab.cli.finished import check_own, finished_run, trusted
from vlmlab.cli.generate import is_bare, quoted
from vlmlab.cli.rules.schema import Score
from vlmlab.contracts.errors import listed
from vlmlab.contracts.terminal import tell
from vlmlab.evaluate.rescore import rescored
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.trust import saved_config

EXAMPLE = "vlmlab score run=outputs/default"


def score_command(cfg: DictConfig) -> None:
    """Print the scores, and whether they are those of the run's result.

    Raises:
        ConfigError: ``run`` is missing or no folder of a run.
        UserError: a benchmark or metric that is not there.
        DataError: answers that are missing or damaged.
    """
    check_own(cfg, Score)
    folder = finished_run(cfg, EXAMPLE)
    trust = trusted(cfg)
    scores = rescored(folder, saved_config(folder, trust), cfg.benchmarks, cfg.metrics, trust)
    tell(final_table({"metrics": scores}, folder))
    tell(compared(scores, (RunFolder(folder).result() or {}).get("metrics", {})))


def compared(scores: Mapping[str, float], result: Mapping[str, float]) -> str:
    """One line: which of the scores are those of ``result.json``, to the last digit."""
    there = [name for name in scores if name in result]
    other = [f"{name} {result[name]} and now {scores[name]}" for name in there if scores[name] != result[name]]
    if not there:
        return "none of these scores is in result.json"
    new = len(scores) - len(there)
    also = f"; {new} are not in it" if new else ""
    if not other:
        return f"{len(there)} scores, all as in result.json{also}"
    return f"{len(other)} of {len(there)} scores are not those of result.json{also}: {listed(other, 200)}"


def with_key(words: Sequence[str]) -> list[str]:
    """The command line with ``run=`` before a word without a key, which names a run or one of its answers' files."""
    found: list[str] = []
    for word in words:
        if not is_bare(word):
            found.append(word)
        elif (file := Path(word)).suffix == ".jsonl" and file.parent.name == "predictions":
            benchmark = file.name.partition(".")[0]  # <benchmark>.shuffled.jsonl is scored with it
            found += [f"run={quoted(str(file.parents[1]))}", f"benchmarks=[{quoted(benchmark)}]"]
        else:
            found.append(f"run={quoted(word)}")
    return found


if __name__ == "__main__":
    conf = conf_folder()
    sys.argv[1:] = with_key(sys.argv[1:])
    main = hydra.main(config_path=str(conf), config_name="score", version_base="1.3")(guard(score_command))
    sys.exit(run_command(main, conf, "score"))

"""Puts the probe's answers of finished runs among those that ship: ``python -m vlmlab.towers.probes <run>...``.

The runs have ``evaluation.probe=true``, the towers as they ship, and all of the benchmarks' questions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmlab.contracts.terminal import tell
from vlmlab.engine.restore import load_trained
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file
from vlmlab.evaluate.probe import SHIPPED, address, shipped
from vlmlab.model.vlm import VLM
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.trust import saved_config


def answers(folder: Path) -> dict[str, dict[str, str]]:
    """The probe's answers of a finished run: address -> sample id -> answer."""
    RunFolder(folder).finished()
    cfg = saved_config(folder)
    model = load_trained(cfg, folder)
    assert isinstance(model, VLM)
    found = {}
    for name, benchmark in cfg.data.benchmarks.items():
        path, key = predictions_file(folder, str(name), "probe"), address(cfg, model, benchmark)
        if path.is_file() and key is not None and cfg.budget.eval_limit is None:
            found[key] = {row.id: row.prediction for row in read_rows(path)}
    return found


def main(folders: Sequence[str]) -> None:
    """Write the shipped answers anew, with those of these runs."""
    known = {key: dict(told) for key, told in shipped().items()}
    for folder in folders:
        known |= answers(Path(folder))
    lines = json.dumps(known, ensure_ascii=False, indent=0, sort_keys=True)
    SHIPPED.write_text(lines + "\n", encoding="utf-8")
    tell(f"{SHIPPED}: {len(known)} benchmarks, {sum(map(len, known.values()))} answers")


if __name__ == "__main__":
    main(sys.argv[1:])

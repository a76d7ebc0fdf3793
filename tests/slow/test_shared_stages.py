"""A sweep whose cells share stages equals one whose cells train everything by themselves, also after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slow.runs import ROOT, command

pytestmark = pytest.mark.slow

SWEEP = (
    "-m", "recipe=two_stage", "recipe.stages.instruct.train.lm=1e-3,2e-3",
    "recipe.stages.align.batch_size=4", "recipe.stages.instruct.batch_size=4", "budget=test", "budget.eval_limit=2",
    "~data.benchmarks.world_captions", "~data.benchmarks.world_compositional", "evaluation.baselines=[]",
    "evaluation.lookup_samples=null", "evaluation.probe=false", "evaluation.held_out=[]", "trainer.save_every_s=0",
    "hydra.launcher.slots=2",
)  # fmt: skip
WALL = ("seconds", "samples_per_s", "peak_bytes", "overrides")
LEFT_OUT = ("lock", "log.txt", "overrides.json", "env.json", "state.json", "config.yaml", "report.html")


def content(cell: Path) -> dict[str, Any]:
    """The files of a cell, without what a clock or a process writes into them."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in cell.rglob("*") if path.is_file() and path.name not in LEFT_OUT):
        if file.suffix in (".json", ".jsonl"):
            lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
            found[str(file.relative_to(cell))] = [_timeless(json.loads(line)) for line in lines]
        else:
            found[str(file.relative_to(cell))] = file.read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in WALL}
    return value


def of_first_seed(sweep: Path) -> dict[str, Path]:
    """The cells of seed 0 by their learning rate."""
    files = [path for path in sweep.glob("*/config.yaml") if re.search(r"^seed: 0$", path.read_text(), re.M)]
    rates = [str(yaml.safe_load(path.read_text())["recipe"]["stages"]["instruct"]["train"]["lm"]) for path in files]
    return {rate: path.parent for rate, path in zip(rates, files, strict=True)}


def kill_one_within_a_shared_stage(sweep: Path, patience: float = 300) -> None:
    """SIGKILL the first cell that holds a stage which no run has finished."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for lock in sweep.glob("shared/*/lock"):
            holder = re.match(r"process (\d+) on", lock.read_text())
            if holder and not (lock.parent / "entry").exists():
                os.kill(int(holder[1]), signal.SIGKILL)
                return
        time.sleep(0.005)
    raise AssertionError("no cell began a shared stage")


def test_a_sweep_with_shared_stages_equals_one_without(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(ROOT / "train.py"), *SWEEP, "seed=0,1", "name=shared"]
    shared = tmp_path / "sweeps" / "shared"
    with (tmp_path / "out.txt").open("w") as out:
        killed = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        try:
            kill_one_within_a_shared_stage(shared)
            assert killed.wait(600) == 1  # one cell did not finish; the other one of its seed took the stage over
        finally:
            killed.kill()
    assert "killed by SIGKILL" in (tmp_path / "out.txt").read_text()
    assert len(list(shared.glob("*/result.json"))) == 3

    again = command("train.py", *SWEEP, "seed=0,1", "name=shared", cwd=tmp_path, timeout=600)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "2 stages were trained once for 4 cells;" in again.stdout
    alone = command("train.py", *SWEEP, "seed=0", "name=alone", "share_stages=false", cwd=tmp_path, timeout=600)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert not (tmp_path / "sweeps/alone/shared").exists()
    ours, own = (of_first_seed(folder) for folder in (shared, tmp_path / "sweeps/alone"))
    assert ours.keys() == own.keys() == {"0.001", "0.002"}  # the one that was killed, and the one that took over
    for rate in own:
        assert content(ours[rate]) == content(own[rate]), rate
        assert {"stages/0_align/model.safetensors", "metrics.jsonl", "result.json"} <= content(own[rate]).keys()

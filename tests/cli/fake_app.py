"""Lays down a tiny application that goes through the real train command, with training replaced by counting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, shutil, signal, sys, time, types
from pathlib import Path

import hydra
import vlmlab.runs.watchdog as watchdog
from vlmlab.cli.entry import guard, run_command
from vlmlab.cli import rules
from vlmlab.cli.train import train_command
from vlmlab.contracts.errors import UserError
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder

rules.admitted = lambda cfg, hydra_cfg, own=(): plain(cfg)  # its keys are not a run's
watchdog.die_with_parent.__defaults__ = (0.1, 20.0)


def train(cfg, folder):
    run = RunFolder(folder)
    bad = Path("bad")
    words = bad.read_text().split() if bad.exists() else []
    with (folder / "trained.txt").open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\\n")
    print("training", cfg.x, cfg.y, flush=True)
    run.write_state("running", "one", 0, 2)
    if words == ["fail", f"{cfg.x}{cfg.y}"]:
        run.log({"stage": "one", "step": 1, "loss": 1.0})  # it had begun to learn
        raise UserError("no luck with x")
    if words == ["crash", f"{cfg.x}{cfg.y}"]:
        raise RuntimeError("broken")
    if words == ["kill", f"{cfg.x}{cfg.y}"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if words == ["gone", f"{cfg.x}{cfg.y}"]:
        shutil.rmtree(folder)
    if words == ["wait"]:
        try:
            time.sleep(300)
        except KeyboardInterrupt:
            raise SystemExit(130)
    return run.finish({"fake/vqa_accuracy": 0.1 * cfg.x, "fake/vqa_accuracy/shuffled": 0.0}, {"params": 1})


sys.modules["vlmlab.train.run"] = types.SimpleNamespace(train=train)
pages = dict.fromkeys(("write_gallery", "write_sweep_gallery"), lambda *a, **k: "report.html")
sys.modules["vlmlab.evaluate.gallery"] = types.SimpleNamespace(**pages)


def terminated(number, frame):
    raise SystemExit(143)


signal.signal(signal.SIGTERM, terminated)
conf = Path(__file__).resolve().parent / "conf"
main = hydra.main(config_path=str(conf), config_name="train", version_base="1.3")(guard(train_command))
if __name__ == "__main__":
    sys.exit(run_command(main, conf, "train"))
"""

CONF = """
defaults:
  - part: big
  - _self_
  - override hydra/launcher: pool
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
name: null
seed: 0
fresh: false
init_from: null
x: 1
y: 1
precision: {name: fp32}
trainer: {devices: 1, accelerator: cpu, threads: 1, workers: 0, save_every_s: 30}
data: {train: {short: {size: 1}}}
objective: {_target_: some.Objective}
recipe:
  stages:
    one: {module: some.Module, train: {lm: 1.0e-3}, data: short, steps: 2, batch_size: 1}
hydra:
  run:
    dir: ${vlmlab.run_folder:outputs,${name},${hydra.overrides.task},${vlmlab.training:${hydra.overrides.task}}}
  sweep:
    dir: ${vlmlab.sweep_folder:sweeps,${name},${hydra.overrides.task},${vlmlab.training:${hydra.overrides.task}}}
    subdir: ${vlmlab.cell_name:${hydra.overrides.task}}
  launcher:
    slots: 2
  output_subdir: null
"""


def lay_down(folder: Path) -> Path:
    """The application's script."""
    (folder / "conf" / "part").mkdir(parents=True)
    (folder / "conf" / "train.yaml").write_text(CONF)
    (folder / "conf" / "part" / "big.yaml").write_text("size: 2\n")
    (folder / "conf" / "part" / "small.yaml").write_text("size: 1\n")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    return script


def start(script: Path, *arguments: str) -> subprocess.Popen[str]:
    """The application, started in its folder."""
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )


def call(script: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a whole call."""
    process = start(script, *arguments)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def trained(folder: Path) -> int:
    """How often training began in a run folder."""
    file = folder / "trained.txt"
    return len(file.read_text().splitlines()) if file.exists() else 0

"""The whole command killed at 20 random moments over all stages, and several real ranks; minutes, so `slow`."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmlab.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.slow

LOST = "another rank of this run has ended"
"""What a collective that waits for a killed rank says, if that comes before the news of the process's end."""


def fake(folder: Path, **changes) -> list[str]:
    """The small lab: two stages, dropout, two workers."""
    stages = {"recipe.stages.align.steps": 30, "recipe.stages.tune.steps": 30}
    settings = {"fake.dropout": 0.3, "trainer.workers": 2, **stages, **changes}
    return [sys.executable, str(Path(__file__).with_name("fake_lab.py")), str(folder), json.dumps(settings)]


def world(folder: Path, *more: str) -> list[str]:
    """The embedded default with few and small steps: all four stages of the real model."""
    stages = ("coarse_align", "deep_align", "caption_pretrain", "instruction_tune")
    small = [f"recipe.stages.{name}.batch_size=4" for name in stages]
    return [
        sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={folder}", "budget=test", "budget.max_steps=10",
        "budget.eval_limit=2", "trainer.save_every_s=0", "++trainer.log_every=1", "trainer.progress=false",
        *small, *more,
    ]  # fmt: skip


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted(folder.glob("stages/*/model.safetensors"))}


def finish(command: list[str]) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("app", "total", "kills"), [(fake, 60, 20), (world, 40, 20)], ids=["fake", "world"])
def test_killed_at_random_moments(tmp_path, app, total, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(app(whole))
    assert steps_done(whole) == total
    draw = random.Random(7)
    killed_runs = 0
    for target in sorted(draw.randrange(1, total) for _ in range(kills)):
        process = subprocess.Popen(
            app(killed), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        while steps_done(killed) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        process.kill()
        killed_runs += process.wait() == -signal.SIGKILL
    assert killed_runs >= kills - 2  # the last ones may come too late
    finish(app(killed))
    assert weights(killed).keys() == weights(whole).keys()
    for stage, tensors in weights(whole).items():
        for name, tensor in tensors.items():
            assert torch.equal(weights(killed)[stage][name], tensor), f"{stage}: {name}"


def child(pid: int, rank: bool) -> int:
    """The first further rank, or the first data worker, of a command."""
    found = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return next(one for one in found if (b"LOCAL_RANK=1" in Path(f"/proc/{one}/environ").read_bytes()) == rank)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("overrides", "victim", "state", "sentence"),
    [
        (("trainer.devices=2", "trainer.workers=0"), "rank 1", "failed", f"rank 1 .* by SIGKILL|{LOST}"),
        (("trainer.devices=2", "trainer.workers=0"), "rank 0", "interrupted", LOST),
        (("trainer.workers=1",), "worker", "failed", "a data worker "),
    ],
    ids=["rank 1", "rank 0", "data worker"],
)
def test_a_killed_process_ends_all_others_in_one_sentence(tmp_path, overrides, victim, state, sentence):
    command = world(tmp_path / "run", "debug.steps=10", "trainer.accelerator=cpu", *overrides)
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while steps_done(tmp_path / "run") < 3 and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid if victim == "rank 0" else child(process.pid, rank=victim == "rank 1"), signal.SIGKILL)
    said = process.communicate(timeout=120)[1].splitlines()  # to the end of every process that has this pipe
    errors = [line for line in said if not line.startswith("Initializing distributed")]
    assert len(errors) == 1 and re.fullmatch(f"error: ({sentence}).*, then give the same command again", errors[0]), (
        errors
    )
    ended = RunFolder(tmp_path / "run").state()
    assert ended["state"] == state and 2 <= ended["step"] < 10
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert again.returncode == 0 and "going on after step " in again.stdout, again.stderr
    assert steps_done(tmp_path / "run") == 10


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_real_ranks_stop_together_and_go_on(tmp_path, strategy):
    """Rank 1 is started by Lightning; only rank 0 gets the signal."""
    ranks = {"trainer.devices": 2, "trainer.workers": 0, "trainer.strategy": strategy}
    finish(fake(tmp_path / "whole", **ranks))
    process = subprocess.Popen(fake(tmp_path / "cut", **ranks), env=ENVIRONMENT)
    while steps_done(tmp_path / "cut") < 35 and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    finish(fake(tmp_path / "cut", **ranks))
    assert weights(tmp_path / "cut").keys() == weights(tmp_path / "whole").keys()
    for stage, tensors in weights(tmp_path / "whole").items():
        for name, tensor in tensors.items():
            assert torch.equal(weights(tmp_path / "cut")[stage][name], tensor), f"{stage}: {name}"


@pytest.mark.timeout(1500)
def test_shards_of_real_towers_stop_together_and_go_on(tmp_path):
    """In every stage once; the last two train by Muon, and what is evaluated at the end is a whole model."""
    ranks = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=fsdp2", "trainer.workers=0")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(world(whole, *ranks))
    for target in (5, 15, 25, 35):
        process = subprocess.Popen(world(cut, *ranks), env=ENVIRONMENT, cwd=ROOT)
        while steps_done(cut) < target and process.poll() is None:
            time.sleep(0.005)
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
        assert target <= steps_done(cut) < target + 5
    finish(world(cut, *ranks))
    assert len(weights(whole)) == 4 and weights(cut).keys() == weights(whole).keys()
    for stage, tensors in weights(whole).items():
        for name, tensor in tensors.items():
            assert torch.equal(weights(cut)[stage][name], tensor), f"{stage}: {name}"
    results = [json.loads((folder / "result.json").read_text())["metrics"] for folder in (whole, cut)]
    assert results[0] == results[1]


def test_wandb_mirrors_a_run(tmp_path):
    """Offline, two runs in one process: each has its own files."""
    logger = {"logger.name": "wandb", "logger.project": "test", "trainer.workers": 0}
    finish(fake(tmp_path / "a", **logger))
    assert len(list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))) == 1

"""``sweep=slurm`` on a SLURM of its own: one controller and two nodes on this machine, without accounting."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_app import lay_down, start, trained

from vlmlab.analyse.progress import show_sweep
from vlmlab.runs.folder import RunFolder

pytestmark = pytest.mark.slow
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SwitchType=switch/none
MpiDefault=none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)
    return condition()


def said(*words: str) -> str:
    """What a command answers; nothing where it fails."""
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stdout


def free_ports() -> list[int]:
    """Three in a row that nothing listens on."""
    for first in range(21_000, 29_000, 7):
        try:
            for port in range(first, first + 3):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + 3))
    raise AssertionError("no three free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A running cluster, which ``SLURM_CONF`` names; skips where SLURM is not installed."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no SLURM to start here ({', '.join(missing) or 'not root'})")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=free_ports()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for command in (
                ["munged", "--force", *files, f"--socket={folder}/munge.socket"],
                ["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"],
            ):  # fmt: skip
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            if not wait_for(lambda: said("sinfo", "-h", "-p", "low", "-o", "%t %D").strip() == "idle 2", 60):
                pytest.skip(f"the two nodes do not come up: {said('sinfo', '-N')}")
            yield
        finally:
            for line in said("squeue", "-h", "-o", "%A").split():
                said("scancel", line)
            for pid in folder.glob("*.pid"):
                os.kill(int(pid.read_text()), signal.SIGTERM)


def test_a_job_outlives_its_launcher_and_its_preemption(cluster: None, tmp_path: Path) -> None:
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    words = ("-m", "name=s", "x=1", "y=1,2", "hydra/launcher=slurm", "hydra.launcher.partition=low")
    words += ("hydra.launcher.cpus=2", "hydra.launcher.minutes=10", "seed=0")
    (tmp_path / "bad").write_text("wait")
    cells = [sweep / "y-1", sweep / "y-2"]
    first = start(script, *words)
    assert wait_for(lambda: all(trained(cell) == 1 for cell in cells)), first.kill() or first.communicate()
    first.kill()
    first.communicate()
    second = start(script, *words)
    jobs = said("squeue", "-h", "-r", "-o", "%i").split()
    assert len(jobs) == 2 and wait_for(lambda: all((cell / "job.json").is_file() for cell in cells))
    time.sleep(3)
    assert said("squeue", "-h", "-r", "-o", "%i").split() == jobs and [trained(cell) for cell in cells] == [1, 1]

    (tmp_path / "bad").unlink()
    said("sbatch", "--chdir", str(tmp_path), "-p", "high", "-N2", "--exclusive", "--wrap", "sleep 1")
    assert wait_for(lambda: all("the job was preempted" in (cell / "log.txt").read_text() for cell in cells))
    assert "waits for its next run, slurm job" in show_sweep(sweep)
    assert wait_for(lambda: said("squeue", "-h", "-p", "high") == "")
    for job in jobs:
        said("scontrol", "update", f"JobId={job}", "StartTime=now")
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0 and "2 cells: 2 done" in out, err
    assert [trained(cell) for cell in cells] == [2, 2] and not list(sweep.glob("*/job.json"))
    assert all(RunFolder(cell).finished() for cell in cells)


def test_a_job_that_is_taken_away_is_lost(cluster: None, tmp_path: Path) -> None:
    script, sweep = lay_down(tmp_path), tmp_path / "sweeps" / "s"
    (tmp_path / "bad").write_text("wait")
    launcher = start(script, "-m", "name=s", "y=1,2", "hydra/launcher=slurm", "hydra.launcher.cpus=2", "seed=0")
    assert wait_for(lambda: trained(sweep / "y-1") == trained(sweep / "y-2") == 1)
    for name in ("y-1", "y-2"):
        job = re.search(r"process (\d+)", (sweep / name / "log.txt").read_text())
        assert job is not None
        os.kill(int(job[1]), signal.SIGKILL)
    out, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 1 and "2 failed" in out and "left no result" in out, out

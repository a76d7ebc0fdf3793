from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmlab.runs.watchdog import LAUNCHER, die_with_parent, expected_parent

CHILD = """
import signal, sys, time
from vlmlab.runs.watchdog import die_with_parent
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
die_with_parent(poll_s=0.05, grace_s=0.3)
print("ready", flush=True)
time.sleep(300)
"""
PARENT = """
import os, subprocess, sys, time
env = dict(os.environ, {name}={value})
child = subprocess.Popen([sys.executable, "-c", {child!r}], env=env, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(300)
"""


def gone(pid: int, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("stubborn", "name", "value"),
    [(False, LAUNCHER, "str(os.getpid())"), (True, LAUNCHER, "str(os.getpid())"), (False, "LOCAL_RANK", "'1'")],
)
def test_a_child_dies_with_its_killed_parent(stubborn: bool, name: str, value: str) -> None:
    source = PARENT.format(name=name, value=value, child=CHILD.format(stubborn=stubborn))
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait(60)
        assert gone(child)
    finally:
        parent.kill()
        if not gone(child, 0.1):
            os.kill(child, signal.SIGKILL)


def test_nobody_is_watched_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert expected_parent() is None
    assert die_with_parent() is None
    monkeypatch.setenv(LAUNCHER, "17")
    assert expected_parent() == 17

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.runs import folder as folder_module
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.lock import is_locked

CONFIG = {"seed": 0, "mask": {"kind": "bidir"}, "recipe": {"stages": {"a": {"steps": 2}}}}
METRICS = {"world_test/vqa_accuracy": 0.5}


def finish(path: Path, config: dict = CONFIG) -> dict:
    with RunFolder(path) as run:
        assert run.open(config, ["mask=bidir"]) is None
        return run.finish(METRICS, {"seconds": 1.0})


def test_a_new_folder_is_trained_and_says_so(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as run:
        assert run.open(CONFIG, ["mask=bidir"]) is None
        assert is_locked(run.path)
        state = RunFolder(run.path).state()
        assert (state["state"], state["pid"]) == ("running", os.getpid())
    assert not is_locked(tmp_path / "r")
    assert RunFolder(tmp_path / "r").config() == CONFIG
    env = RunFolder(tmp_path / "r").env()
    assert env["overrides"] == ["mask=bidir"] and len(env["code"]) == 16 and env["packages"]["numpy"]


def test_a_finished_folder_gives_its_result(tmp_path: Path) -> None:
    result = finish(tmp_path)
    assert result["metrics"] == METRICS and result["overrides"] == ["mask=bidir"] and result["seed"] == 0
    assert result["format"] == 1
    with RunFolder(tmp_path) as run:
        assert run.open({**CONFIG, "name": "other", "fresh": True}) == result
        assert run.state()["state"] == "done"
        assert not run.by_other_code()


@pytest.mark.parametrize("done", [True, False])
def test_another_configuration_is_refused_naming_keys_and_values(tmp_path: Path, done: bool) -> None:
    with RunFolder(tmp_path) as run:
        run.open(CONFIG)
        if done:
            run.finish(METRICS, {})
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"mask\.kind: bidir -> causal") as caught:
        RunFolder(tmp_path).open({**CONFIG, "mask": {"kind": "causal"}})
    assert "\n" not in str(caught.value) and "fresh=true" in str(caught.value)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
    assert not is_locked(tmp_path)


def test_fresh_keeps_the_old_folder_aside(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for k in (1, 2):
        finish(path)
        (path / "log.txt").write_text("output")
        with RunFolder(path) as run:
            assert run.open({**CONFIG, "seed": k}, fresh=True) is None
            assert is_locked(path)
            run.finish(METRICS, {})
        aside = RunFolder(tmp_path / f"r.old-{k}")
        assert aside.result() is not None and not is_locked(aside.path)
        assert (path / "log.txt").exists() and not (aside.path / "log.txt").exists()
        CONFIG_NOW = RunFolder(path).config()
        assert CONFIG_NOW is not None and CONFIG_NOW["seed"] == k
        subprocess.run(["rm", "-r", str(path)], check=True)


def test_fresh_on_nothing_moves_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as run:
        assert run.open(CONFIG, fresh=True) is None
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_an_unfinished_folder_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.open(CONFIG)
        run.write_state("running", "a", 1, 2)
        run.log({"stage": "a", "step": 1, "loss": 2.0})
        run.end("failed", "a reason")
    assert RunFolder(tmp_path).state() | {"pid": 0, "host": ""} == {
        "state": "failed", "stage": "a", "step": 1, "steps": 2, "pid": 0, "host": "", "error": "a reason",
    }  # fmt: skip
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) is None
        assert run.state()["state"] == "running" and run.state()["step"] == 1
        assert len(run.metrics()) == 1


def test_a_result_of_other_code_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path)
    monkeypatch.setattr(folder_module, "code_fingerprint", lambda: "other")
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) is not None
        assert run.by_other_code()


def test_a_run_resumed_by_other_code_stays_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path) as run:
        run.open(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "code_fingerprint", lambda: "other")
        with RunFolder(tmp_path) as run:
            run.open(CONFIG)
    finish(tmp_path)
    assert RunFolder(tmp_path).by_other_code()


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        RunFolder(tmp_path).open(CONFIG)


HOLD = """
import sys, time
from pathlib import Path
from vlmlab.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.open({config}, [])
run.write_state("running", "a", 1, 2)
print("held", flush=True)
time.sleep(300)
"""


def test_a_held_folder_is_refused_and_a_killed_holder_is_no_obstacle(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(config=CONFIG), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
            RunFolder(tmp_path).open(CONFIG)
        assert RunFolder(tmp_path).state()["state"] == "running"
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
    finally:
        holder.kill()
    assert RunFolder(tmp_path).state()["state"] == "interrupted"
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) is None


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open(CONFIG)
    ready, say_ready = os.pipe()
    go, say_go = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say_ready, b".")
        os.read(go, 1)  # until the parent has looked
        os._exit(0)
    os.read(ready, 1)
    run.close()
    free = not is_locked(tmp_path)
    os.write(say_go, b".")
    os.waitpid(child, 0)
    for descriptor in (ready, say_ready, go, say_go):
        os.close(descriptor)
    assert free


def test_the_child_of_a_fork_ending_leaves_the_parents_lock(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.open(CONFIG)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert is_locked(tmp_path)


def test_cut_back_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for stage, step in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("c", 1)):
        run.log({"stage": stage, "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "c", "st')
    run.cut_back("b", 2)
    assert [(r["stage"], r["step"]) for r in run.metrics()] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    run.log({"stage": "b", "step": 3})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    run.cut_back("a", -1)
    assert run.metrics() == []


def test_cut_back_to_a_stage_without_rows_keeps_the_earlier_ones(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"stage": "a", "step": 2})
    run.cut_back("b", 0)
    assert run.metrics() == [{"stage": "a", "step": 2}]

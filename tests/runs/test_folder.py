from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlmlab.contracts.errors import CheckpointError, UserError
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
        run.log({"stage": "a", "step": 1})
        if done:
            run.finish(METRICS, {})
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"mask\.kind: bidir -> causal") as caught:
        RunFolder(tmp_path).open({**CONFIG, "mask": {"kind": "causal"}})
    assert "\n" not in str(caught.value) and "fresh=true" in str(caught.value)
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
    assert not is_locked(tmp_path)


SCORED = {**CONFIG, "evaluation": {"batch_size": 64}, "trainer": {"threads": 1}, "collate": {"max_length": 100}}
SCORING = {
    "evaluation": {"evaluation": {"batch_size": 4}},
    "limit": {"budget": {"eval_limit": 3}},
    "benchmarks": {"data": {"benchmarks": {"b": {"max_new_tokens": 9}}}},
    "longer": {"collate": {"max_length": 200}},
}


def train(path: Path) -> None:
    """Leave the weights of the only stage."""
    (path / "stages" / "0_a").mkdir(parents=True)
    (path / "stages" / "0_a" / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize("change", SCORING.values(), ids=SCORING)
def test_another_evaluation_of_the_same_training_keeps_the_weights_and_the_old_result(
    tmp_path: Path, change: dict
) -> None:
    train(tmp_path)
    old = finish(tmp_path, SCORED)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "b.jsonl").write_text("said")
    for k in (1, 2):
        with RunFolder(tmp_path) as run:
            assert run.open(SCORED | (change if k == 1 else {})) is None or (k == 2 and "collate" in change)
            if k == 1:
                assert run.result() is None and run.config() == SCORED | change
                run.finish({"b/c": 0.1}, {})
        if k == 1:
            assert json.loads((tmp_path / "result.old-1.json").read_text()) == old
            assert (tmp_path / "predictions.old-1" / "b.jsonl").read_text() == "said"
            assert "batch_size: 64" in (tmp_path / "config.old-1.yaml").read_text()
            assert RunFolder(tmp_path).holds(SCORED | change) and not RunFolder(tmp_path).holds(SCORED)
        if "collate" in change:
            break  # a shorter one is another training
    assert (tmp_path / "stages" / "0_a" / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("change", SCORING.values(), ids=SCORING)
def test_a_training_that_is_not_over_goes_on_under_another_evaluation(tmp_path: Path, change: dict) -> None:
    with RunFolder(tmp_path) as run:
        run.open(SCORED)
        run.write_state("running", "a", 1, 2)
    with RunFolder(tmp_path) as run:
        assert run.open(SCORED | change) is None and run.state()["step"] == 1


def test_a_longer_length_is_refused_where_rows_were_left_out_of_a_training_that_is_not_over(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.open(SCORED)
        run.log({"stage": "a", "step": 1})
    (tmp_path / "skipped.jsonl").write_text('{"data": "data.train.x", "id": "1", "reason": "too long"}\n')
    with pytest.raises(UserError, match="max_length: 100 -> 200"):
        RunFolder(tmp_path).open(SCORED | SCORING["longer"])


def test_another_machine_is_refused_in_the_middle_and_no_matter_afterwards(tmp_path: Path) -> None:
    other = SCORED | {"trainer": {"threads": 2}}
    with RunFolder(tmp_path) as run:
        run.open(SCORED)
        run.log({"stage": "a", "step": 1})
    with pytest.raises(UserError, match="threads: 1 -> 2"):
        RunFolder(tmp_path).open(other)
    train(tmp_path)
    with RunFolder(tmp_path) as run:
        assert run.open(other) is None  # to be scored
        result = run.finish(METRICS, {})
    with RunFolder(tmp_path) as run:
        assert run.open(SCORED) == result and run.differs(SCORED).execution == ("trainer.threads: 2 -> 1",)


def test_a_result_whose_weights_were_deleted_is_not_thrown_away(tmp_path: Path) -> None:
    finish(tmp_path, SCORED)
    with pytest.raises(UserError, match="batch_size: 64 -> 4"):
        RunFolder(tmp_path).open(SCORED | SCORING["evaluation"])
    assert RunFolder(tmp_path).result() is not None


def test_a_result_that_lacks_a_benchmark_is_gone_on_with(tmp_path: Path) -> None:
    train(tmp_path)
    with RunFolder(tmp_path) as run:
        run.open(SCORED)
        assert run.finish(METRICS, {}, {"b": "too long"})["failed"] == {"b": "too long"}
    with RunFolder(tmp_path) as run:
        assert not run.holds(SCORED)
        assert run.open(SCORED) is None
        known = run.result()
        assert known is not None and known["metrics"] == METRICS


def test_a_run_that_failed_before_it_had_learnt_anything_keeps_no_name(tmp_path: Path) -> None:
    other = {**SCORED, "seed": 5}
    with RunFolder(tmp_path) as run:
        run.open(SCORED)
        run.end("failed", "data.val_fraction is too small")
    (tmp_path / "skipped.jsonl").write_text('{"data": "data.train.x", "id": "1"}\n')
    with RunFolder(tmp_path) as run:
        assert run.open(other) is None and run.config() == other
        assert not (tmp_path / "skipped.jsonl").exists()
        (tmp_path / "stages" / "0_a").mkdir(parents=True)
        (tmp_path / "stages" / "0_a" / "last.ckpt").write_bytes(b"learnt")
        run.end("failed", "later")
    with pytest.raises(UserError, match="seed: 5 -> 0"):
        RunFolder(tmp_path).open(SCORED)


def test_a_refusal_names_as_many_keys_as_fit(tmp_path: Path) -> None:
    many = {**CONFIG, "x": {f"key_{k}": "v" * 40 for k in range(20)}}
    with RunFolder(tmp_path) as run:
        run.open(many)
        run.log({"stage": "a", "step": 1})
    with pytest.raises(UserError, match=r"x\.key_0: .*; and \d+ more") as caught:
        RunFolder(tmp_path).open({**CONFIG, "x": {f"key_{k}": "w" * 40 for k in range(20)}})
    assert len(str(caught.value)) <= 300


def test_a_run_that_was_stopped_before_its_first_step_keeps_no_name(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.open(SCORED)
        run.log({"stage": "a", "step": 0, "held_out/loss": 4.0})
        run.end("interrupted")
    with RunFolder(tmp_path) as run:
        assert run.open({**SCORED, "seed": 5}) is None and not run.metrics()


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


@pytest.mark.parametrize("config", ["services: {web: {image: nginx}}\n", "- a list\n", "a: [1", "{a: &x [*x]}"])
def test_a_folder_that_is_no_run_is_left_alone(config: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text(config)
    (project / "work.py").write_text("important")
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"project has config\.yaml and cannot be told to be a run's") as caught:
            RunFolder(project).open(CONFIG, fresh=fresh)
        assert "fresh" not in str(caught.value) and "\n" not in str(caught.value)
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with RunFolder(tmp_path / "notes") as run:
        assert run.open(CONFIG, fresh=True) is None and (run.path / "todo.txt").exists()
    assert not list(tmp_path.glob("*.old-*"))


@pytest.mark.parametrize("damage", ["", "a: [1", "- 1", "\0\x01\x02", "seed: &a [*a]", "seed: ???", "recipe: 3"])
def test_a_damaged_configuration_is_written_anew_by_its_own_command(damage: str, tmp_path: Path) -> None:
    result = finish(tmp_path)
    whole = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(damage)
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged \(.+, and this is not the command it is of"):
        RunFolder(tmp_path).open({**CONFIG, "seed": 3})
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged .*give the run's training command again") as e:
        RunFolder(tmp_path).finished()
    assert len(str(e.value)) <= 300 and not RunFolder(tmp_path).holds(CONFIG)
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) == result
    assert (tmp_path / "config.yaml").read_text() == whole
    (tmp_path / "config.yaml").write_text(damage)
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG, fresh=True) is None
    assert (tmp_path.parent / f"{tmp_path.name}.old-1" / "result.json").is_file()


def test_a_lost_configuration_gives_nobody_elses_result(tmp_path: Path) -> None:
    result = finish(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"config\.yaml is missing, and this is not the command it is of"):
        RunFolder(tmp_path).open({**CONFIG, "seed": 3})
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) == result


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff\x00", b'{"codes": 3}', b'{"stages": []}', b"[" * 5000])
def test_a_damaged_env_is_named_with_what_is_lost(damage: bytes, tmp_path: Path) -> None:
    result = finish(tmp_path)
    (tmp_path / "env.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"env\.json is damaged.*; delete it and give the same command: only"):
        RunFolder(tmp_path).by_other_code()
    (tmp_path / "env.json").unlink()
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) == result


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "metrics": 3}', b"\xff"])
def test_a_damaged_result_is_made_again(damage: bytes, tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "result.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"is not finished \(its result.json is damaged\); start its training"):
        RunFolder(tmp_path).finished()
    with RunFolder(tmp_path) as run:
        assert run.open(CONFIG) is None


def test_damaged_rows_and_stage_facts_cost_no_training(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\x00\n[1]\n{"stage": "a", "step": "x"}\n' + b"[" * 5000 + b"\n")
    run.log({"stage": "a", "step": 1})
    run.log({"stage": "a", "step": 2, "finished": True, "seconds": 3.5})
    run.cut_back("a", 2)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    (tmp_path / "stages" / "0_a").mkdir(parents=True)
    file = tmp_path / "stages" / "0_a" / "stage.json"
    assert run.stage_facts(0, "a") == ({"seconds": 3.5}, f"{file} is missing; metrics.jsonl has its seconds")
    for damage in ("", "[]", '{"seconds": "x"}', '{"seconds": NaN}'):
        file.write_text(damage)
        assert run.stage_facts(0, "a") == ({"seconds": 3.5}, f"{file} is damaged; metrics.jsonl has its seconds")
    file.write_text('{"seconds": 1.0, "steps": 2}')
    assert run.stage_facts(0, "a") == ({"seconds": 1.0, "steps": 2}, "")


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "stages" / "0_a").mkdir(parents=True)
    left = [tmp_path / ".result.json.77.new", tmp_path / "stages" / "0_a" / ".model.safetensors.77.new"]
    for file in left:
        file.write_bytes(b"half")
    with RunFolder(tmp_path) as run:
        run.open(CONFIG)
    assert not any(file.exists() for file in left)


def test_a_damaged_lock_is_no_obstacle(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "lock").write_bytes(b"\xff\x00\x1b[2J" * 100)
    with RunFolder(tmp_path) as run:
        run.open(CONFIG)
        with pytest.raises(UserError, match="is in use by process"):
            RunFolder(tmp_path).open(CONFIG)
    (tmp_path / "lock").unlink()
    os.mkfifo(tmp_path / "lock")
    assert not is_locked(tmp_path)
    with pytest.raises(UserError, match="lock is not a file; remove it"):
        RunFolder(tmp_path).open(CONFIG)


def test_a_value_of_the_environment_is_no_other_configuration(tmp_path: Path) -> None:
    known = {**CONFIG, "path": "/secret"}
    with RunFolder(tmp_path) as run:
        run.open(known, written={**CONFIG, "path": "${oc.env:SOMEWHERE}"})
        run.finish(METRICS, {})
    assert RunFolder(tmp_path).refuses(known) is None
    assert "path" in (RunFolder(tmp_path).refuses({**known, "path": "/elsewhere"}) or "")

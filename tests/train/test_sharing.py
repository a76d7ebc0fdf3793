import json
import os
import subprocess
import sys
import threading
import time

import pytest
from fake_lab import FakeSource, build, config, run

from vlmlab.contracts.errors import UserError
from vlmlab.engine.restore import enter, new_staged_model
from vlmlab.engine.stage import StageModule
from vlmlab.recipe.stage import parse
from vlmlab.runs import shared
from vlmlab.runs.environment import package_folder
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.shared import held, sharing_note, shelf_of
from vlmlab.train import sharing

WALL = ("seconds", "samples_per_s", "peak_bytes")


class Stop(Exception):
    """Ends a run within a step."""


@pytest.fixture
def steps(monkeypatch):
    """The stages of all optimizer steps that are taken, and a dict whose `steps`, if set, ends a run there."""
    real, taken, left = StageModule.on_before_optimizer_step, [], {}

    def noting(self, optimizer):
        if len(taken) == left.get("steps", -1):
            raise Stop
        taken.append(self.stage.name)
        real(self, optimizer)

    monkeypatch.setattr(StageModule, "on_before_optimizer_step", noting)
    return taken, left


def cell(sweep, name):
    folder = sweep / name
    folder.mkdir(parents=True)
    (folder / "overrides.json").write_text("[]")
    return folder


def content(folder):
    """The files of a run without what a clock or a process writes."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name in ("lock", "overrides.json", "env.json", "state.json", "config.yaml"):
            continue
        if name.endswith((".json", ".jsonl")):
            rows = [json.loads(line) for line in ([file.read_text()] if name.endswith(".json") else file.open())]
            found[name] = [_timeless(row) for row in rows]
        else:
            found[name] = file.read_bytes()
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in WALL}
    return value


def tuned(rate, **changes):
    return config(recipe__stages__tune__train={"connector": rate, "lm": 1e-3}, **{"share_stages": "auto"} | changes)


def test_cells_train_a_common_stage_once_and_are_those_of_one_alone(tmp_path, steps, capsys):
    taken, _ = steps
    for rate in (1e-3, 2e-3):
        run(tuned(rate), cell(tmp_path / "sweep", f"rate-{rate}"))
    assert taken == ["align"] * 6 + ["tune"] * 5 + ["tune"] * 5
    said = capsys.readouterr().out
    assert said.count("the same stage was trained for another run") == 1
    for rate in (1e-3, 2e-3):
        run(tuned(rate, share_stages=False), tmp_path / "alone")
        assert content(tmp_path / "sweep" / f"rate-{rate}") == content(tmp_path / "alone")
        (tmp_path / "alone").rename(tmp_path / f"alone-{rate}")
    facts = [json.loads((f / "stages/0_align/stage.json").read_text()) for f in (tmp_path / "sweep").glob("rate-*")]
    assert facts[0] == facts[1] and facts[0]["seconds"] > 0  # what it took where it was trained
    note = sharing_note(tmp_path / "sweep")
    assert note is not None and note.startswith("1 stage was trained once for 2 cells;")
    assert sharing_note(tmp_path) is None


def test_all_stages_are_common_where_only_the_evaluation_differs(tmp_path, steps):
    for limit in (1, 2):
        run(config(share_stages="auto", budget__eval_limit=limit), cell(tmp_path, f"limit-{limit}"))
    assert steps[0] == ["align"] * 6 + ["tune"] * 5
    assert str(sharing_note(tmp_path)).startswith("2 stages were trained once for 2 cells;")


def test_who_dies_within_a_common_stage_is_replaced(tmp_path, steps):
    taken, left = steps
    left["steps"] = 3
    first = cell(tmp_path, "first")
    with pytest.raises(Stop):
        run(tuned(1e-3), first)
    assert (first / "stages/0_align/last.ckpt").is_file() and not list((tmp_path / "shared").glob("*/entry"))
    left.clear()
    run(tuned(2e-3), cell(tmp_path, "second"))
    del taken[:]
    run(tuned(1e-3), first)  # had begun the stage and takes it finished
    assert taken == ["tune"] * 5 and not (first / "stages/0_align/last.ckpt").exists()
    run(tuned(1e-3, share_stages=False), tmp_path / "alone")
    assert content(first) == content(tmp_path / "alone")


def test_what_is_damaged_or_half_there_is_trained_again(tmp_path, steps):
    run(tuned(1e-3), cell(tmp_path, "first"))
    (weights,) = [p for p in (tmp_path / "shared").glob("*/entry/model.safetensors") if b"align" in p.read_bytes()]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()  # the first run's file is the same one on the disk
    weights.write_bytes(data)
    (weights.parent.parent / ".new").mkdir()
    (weights.parent.parent / ".new/model.safetensors").write_bytes(b"half")
    del steps[0][:]
    run(tuned(2e-3), cell(tmp_path, "second"))
    assert steps[0] == ["align"] * 6 + ["tune"] * 5
    assert weights.read_bytes() == (tmp_path / "first/stages/0_align/model.safetensors").read_bytes()
    run(tuned(3e-3), cell(tmp_path, "third"))
    assert steps[0][11:] == ["tune"] * 5


def test_a_disk_that_takes_nothing_costs_nothing_but_the_sharing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shared.Place, "put", full)
        assert run(tuned(1e-3), cell(tmp_path, "first"))
    (tmp_path / "file").write_text("")
    assert run(tuned(1e-3, share_stages=str(tmp_path / "file")), cell(tmp_path, "second"))
    said = capsys.readouterr().out
    assert "does not take it (No space left on device)" in said and "cannot be used (Not a directory)" in said


def test_on_for_sweeps_and_for_a_folder_and_off_by_the_key(tmp_path):
    one, many = tmp_path / "run", cell(tmp_path, "cell")
    assert shelf_of("auto", one) is None and shelf_of("auto", many) == tmp_path / "shared"
    assert shelf_of(False, many) is None and shelf_of(None, many) is None
    assert shelf_of(str(tmp_path / "all"), one) == tmp_path / "all"
    with pytest.raises(UserError, match="share_stages=True is not possible; give auto, false, or a folder"):
        shelf_of(True, one)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"debug__overfit": 8}, "debug is on"),
        ({"recipe__finish": {"_target_": "x.y"}}, "recipe.finish"),
        ({"fresh": True}, "fresh=true"),
        ({"trainer__devices": 2}, "several ranks"),
        ({"trainer__devices": "auto"}, "several ranks"),
    ],
)
def test_what_cannot_be_known_is_not_shared_and_said(tmp_path, changes, reason):
    said = []
    cfg = config(share_stages="auto", **changes)
    assert sharing.Sharing(cfg, RunFolder(cell(tmp_path, "cell")), said.append).shelf is None
    assert reason in said[0]


def test_a_stage_that_is_mixed_with_another_run_is_not_shared(tmp_path):
    cfg = config(share_stages="auto", recipe__stages__align__mix={"run": "outputs/run", "share": 0.5})
    common = sharing.Sharing(cfg, RunFolder(cell(tmp_path, "cell")), print)
    with common.place(parse(cfg)[0], entered(cfg)[0], FakeSource()) as place:
        assert place is None


def entered(cfg):
    stage = parse(cfg)[0]
    staged = new_staged_model(cfg, build)
    enter(staged, cfg, stage)
    return staged, stage


def addressed(cfg, folder, source=None):
    staged, stage = entered(cfg)
    return sharing.address(sharing.describe(cfg, stage, staged, source or FakeSource(), RunFolder(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"fake__dropout": 0.2},
        {"trainer__threads": 2},
        {"trainer__gradient_clip": None},
        {"trainer__log_every": 2},
        {"precision__name": "bf16"},
        {"collate": {"pack_length": 3}},
        {"data__train__short__size": 49},
        {"data__max_bad_fraction": 0.5},
        {"recipe__stages__align__steps": 7},
        {"recipe__stages__align__train": {"connector": 2e-2}},
        {"recipe__stages__align__mask": {"_target_": "vlmlab.mask.causal.Causal"}},
        {"recipe__stages__align__adapter": {"_target_": "fake_lab.FakeAdapter"}},
        {"recipe__stages__align__objective": {"_target_": "fake_lab.FakeImageLoss"}},
        {"mask": {"_target_": "vlmlab.mask.causal.Causal"}},
        {"budget__steps_scale": 0.5},
        {"evaluation": {"every": 2}, "data__val": {"short": {"_target_": "fake_lab.FakeSource"}}},
        {"a_key_that_nobody_thought_of": 1},
    ],
    ids=str,
)
def test_what_may_change_a_stage_changes_its_address(tmp_path, changes):
    assert addressed(config(**changes), tmp_path) != addressed(config(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "fresh": True},
        {"trainer__save_every_s": 7, "trainer__progress": True},
        {"adapter": {"_target_": "fake_lab.FakeAdapter"}, "recipe__stages__align__adapter": None},
        {"recipe__stages__tune__steps": 7},
        {"recipe__stages__more": {"module": "fake_lab.FakeInstruction", "train": {"lm": 1e-3}, "data": "chat",
                                  "steps": 1, "batch_size": 8}},
        {"data__train__chat__size": 32},
        {"data__benchmarks": {"x": {"source": None}}, "evaluation": {"batch_size": 3}},
        {"budget__eval_limit": 3},
        {"data__screen": 5},
    ],
    ids=str,
)  # fmt: skip
def test_what_matters_elsewhere_only_does_not(tmp_path, changes):
    assert addressed(config(**changes), tmp_path) == addressed(config(), tmp_path)


def test_data_code_weights_and_versions_are_in_the_address(tmp_path, monkeypatch):
    cfg = config()
    before = addressed(cfg, tmp_path)
    source = FakeSource()
    source.fingerprint = lambda: {"files": "other"}
    assert addressed(cfg, tmp_path, source) != before
    staged, stage = entered(cfg)
    staged.model.lm["head"].weight.data[0, 0] += 1
    folder = RunFolder(tmp_path)
    assert sharing.address(sharing.describe(cfg, stage, staged, FakeSource(), folder)) != before
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "code_fingerprint", lambda: "other")
        assert addressed(cfg, tmp_path) != before
    assert addressed(cfg, tmp_path) == before
    (tmp_path / "env.json").write_text(json.dumps({"packages": {"torch": "0.1"}}))
    assert addressed(cfg, tmp_path) != before


def test_code_of_plug_ins_outside_the_package_is_in_the_address(tmp_path, monkeypatch):
    (tmp_path / "own_mask.py").write_text("from vlmlab.mask.causal import Causal as Own\n\ndef other():\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    target = {
        "recipe__stages__align__mask": {"_target_": "vlmlab.mask.causal.Causal"},
        "extra": {"_target_": "own_mask.other"},
    }
    before = addressed(config(**target), tmp_path)
    (tmp_path / "own_mask.py").write_text("def other():\n    return 1\n")
    assert addressed(config(**target), tmp_path) != before


def test_who_comes_second_waits_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "POLL_S", 0.01)
    said, got = [], threading.Event()

    def second():
        with held(tmp_path, "a", said.append):
            got.set()

    with held(tmp_path, "a", print):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not got.is_set()
    assert got.wait(20)
    thread.join(20)
    assert len(said) == 1 and f"being trained by process {os.getpid()} on" in said[0] and "waiting for it" in said[0]


def test_the_lock_dies_with_its_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "POLL_S", 0.01)
    program = (
        "import sys, time, pathlib\nfrom vlmlab.runs.shared import held\n"
        "with held(pathlib.Path(sys.argv[1]), 'a', print):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(package_folder().parent)}
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        threading.Timer(0.2, holder.kill).start()
        began = time.monotonic()
        with held(tmp_path, "a", print):
            assert time.monotonic() - began < 30
    finally:
        holder.kill()
        holder.wait(20)


def test_skipped_rows_come_along(tmp_path):
    folder = RunFolder(cell(tmp_path, "one"))
    cfg = config(share_stages="auto")
    (folder.path / "skipped.jsonl").write_text('{"data": "data.train.short", "id": "7", "reason": "bad"}\n')
    run(cfg, folder.path)
    other = cell(tmp_path, "two")
    run(config(share_stages="auto"), other)
    assert (other / "skipped.jsonl").read_text() == (folder.path / "skipped.jsonl").read_text()

"""The train command around a fake training: what it prints, leaves and exits with."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from fake_app import call, lay_down, start, trained
from omegaconf import OmegaConf
from PIL import Image

from vlmlab.cli.data import check_sources
from vlmlab.runs.folder import RunFolder


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return lay_down(tmp_path)


def test_train_then_reuse_then_refuse(script: Path) -> None:
    folder = script.parent / "outputs" / "r"
    code, out, err = call(script, "name=r", "x=2")
    assert (code, err) == (0, ""), err
    assert "run folder: outputs/r" in out and "report.html" in out
    assert json.loads((folder / "result.json").read_text())["overrides"] == ["name=r", "x=2"]
    code, out, _ = call(script, "x=2", "name=r", "trainer.workers=3")
    assert code == 0 and out.startswith("outputs/r is finished; fresh=true trains again") and "0.200" in out
    assert trained(folder) == 1 and out.endswith("report.html\n")  # which was not there: its process had been killed
    (folder / "report.html").touch()
    assert "report.html" not in call(script, "x=2", "name=r")[1]
    code, out, err = call(script, "name=r", "x=3")
    assert (code, out) == (1, "") and err.startswith(
        "error: outputs/r holds a run of another configuration (x: 2 -> 3)"
    )
    assert len(err.splitlines()) == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "env.json", "lock", "report.html", "result.json", "state.json", "trained.txt"}


@pytest.mark.parametrize(("word", "words"), [("fail", "error: no luck with x\n"), ("crash", "RuntimeError: broken")])
def test_a_failure_is_left_in_the_state(script: Path, word: str, words: str) -> None:
    (script.parent / "bad").write_text(f"{word} 11")
    code, _, err = call(script)
    assert code == 1 and words in err
    assert ("Traceback" in err) == (word == "crash")
    state = RunFolder(script.parent / "outputs" / "default").state()
    assert state["state"] == "failed" and state["stage"] == "one"
    assert state["error"] == ("no luck with x" if word == "fail" else "RuntimeError: broken")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_and_the_same_command_goes_on(script: Path, number: int, code: int) -> None:
    folder = script.parent / "outputs" / "default"
    (script.parent / "bad").write_text("wait")
    process = start(script)
    until = time.monotonic() + 150
    while not trained(folder) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code and err == "interrupted; the same command goes on from here\n"
    assert RunFolder(folder).state()["state"] == "interrupted"
    (script.parent / "bad").unlink()
    assert call(script)[0] == 0
    assert RunFolder(folder).result() is not None


def test_images_on_both_sides_are_said(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (2, 2), (n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    rows = [{"question_id": n, "image": name, "question": "q", "answer": "a"}
            for n, name in enumerate(["0.png", "1.png", "copy.png", "2.png"])]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "test.json").write_text(json.dumps(rows[2:]))
    source = {"_target_": "vlmlab.data.readers.vqa.VqaJson", "images": str(tmp_path)}
    train, test = ({**source, "path": str(tmp_path / f"{name}.json")} for name in ("train", "test"))
    stages = {"one": {"data": "instruct"}}
    data = {"train": {"instruct": train}, "benchmarks": {"b": {"source": test}}}
    cfg = OmegaConf.create({"recipe": {"stages": stages}, "data": data})
    assert check_sources(cfg) == [
        "1 image of data.benchmarks.b.source is in data.train.instruct too, byte for byte (1.png is copy.png)"
    ]
    cfg.data.benchmarks.b.source = {**train, "multi_turn": False}
    assert "2 images of data.benchmarks.b.source are in data.train.instruct too" in check_sources(cfg)[0]

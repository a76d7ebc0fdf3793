"""Commands of the README and the guide run: two steps a stage, in a folder with tiny files of the names they use."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import pages
from tests.published.models import llava
from tests.slow.runs import ROOT, command, verb
from vlmlab.data.world.sources import WorldQuestions

pytestmark = pytest.mark.slow


def user_files(folder: Path) -> None:
    """The data files that the commands name."""
    source = WorldQuestions(split="train", size=150, multi_turn=False)
    Image.fromarray(source[0].images[0]).save(folder / "image.png")
    (folder / "images").mkdir()
    questions, chats, captions, images = [], [], [], []
    for index in range(len(source)):
        sample, name = source[index], f"images/{index}.png"
        Image.fromarray(sample.images[0]).save(folder / name)
        turn = sample.turns[0]
        questions.append({"question_id": index, "image": name, "question": turn.prompt, "answer": turn.answer})
        talk = [{"from": "human", "value": f"<image>\n{turn.prompt}"}, {"from": "gpt", "value": turn.answer}]
        chats.append({"id": str(index), "image": f"{index}.png", "conversations": talk})
        images.append({"id": index, "file_name": f"{index}.png"})
        captions += [{"id": 2 * index + k, "image_id": index, "caption": f"picture {index % 7} {k}"} for k in range(2)]
    shutil.copytree(llava(), folder / "llava")
    (folder / "train.json").write_text(json.dumps(questions[:120]))
    (folder / "test.json").write_text(json.dumps(questions[120:]))
    (folder / "chat.json").write_text(json.dumps(chats))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))


def finished(folder: Path) -> Path:
    """A run that an earlier command has finished."""
    return next(path for path in (folder / "outputs").iterdir() if (path / "result.json").is_file())


def swept(folder: Path) -> Path:
    """The sweep of connectors and masks that an earlier command has run."""
    tables = (folder / "sweeps").glob("*/table.csv")
    return next(path.parent for path in tables if path.read_text().startswith("connector,mask,"))


def test_the_pages_have_commands() -> None:
    assert len(pages.trained()) >= 40


def test_every_command_runs(tmp_path: Path) -> None:
    user_files(tmp_path)
    for line in pages.trained():
        if "sweep=optuna" in line and importlib.util.find_spec("optuna") is None:
            continue
        if line.startswith("vlmlab "):
            there = {
                "run=outputs/<name>": lambda: f"run={finished(tmp_path)}",
                "outputs/<name>": lambda: str(finished(tmp_path)),
                "sweeps/<name>": lambda: str(swept(tmp_path)),
                "n=4000": lambda: "n=64",
            }
            words = [there[word]() if word in there else word for word in shlex.split(line)[1:]]
            done = verb(*words, cwd=tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
            continue
        script, *arguments = shlex.split(line)[1:]
        if script == "evaluate.py":
            arguments = [f"run={finished(tmp_path)}"]
        elif not {"--help", "--cfg"} & set(arguments):
            arguments.append("budget=test")
        done = command(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_a_connector_of_ones_own_trains_outside_of_the_package(tmp_path: Path) -> None:
    """The two files of the tutorial's page, in a folder that has nothing else."""
    pages.write(pages.CONNECTOR, tmp_path)
    (line,) = [line for line in pages.commands(pages.CONNECTOR) if line.startswith("vlmlab train")]
    done = subprocess.run(
        [sys.executable, "-m", "vlmlab.cli", *shlex.split(line)[1:], "name=pooled"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join((".", str(ROOT / "src")))},
        text=True, capture_output=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "outputs/pooled/result.json").read_text())
    assert result["cost"]["visual_tokens"] == 1

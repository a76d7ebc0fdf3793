"""A file of weights is whole and its run's own, or one sentence says what is wrong with it and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_lab import FakeVLM, config, evaluate, run
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.tiny import seen

from vlmlab.contracts.errors import CheckpointError
from vlmlab.engine import stage as stage_module
from vlmlab.engine.restore import load_trained
from vlmlab.engine.stamp import Stamp, stage_hash
from vlmlab.engine.weights import StagedModel
from vlmlab.recipe.stage import Stage, parse
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.resume import content_of, load_last, save_last
from vlmlab.train.run import train

STAMP = Stamp(3, "align", 0, "0123456789abcdef")


def entered() -> tuple[StagedModel, Stage, DictConfig]:
    cfg = config()
    stage, staged = parse(cfg)[0], StagedModel(FakeVLM())
    staged.enter(stage)
    return staged, stage, cfg


def written(folder: Path) -> tuple[Path, Path]:
    """A stage's two files, with a stamp."""
    staged, stage, cfg = entered()
    staged.save(folder / "model.safetensors", stage, cfg, STAMP)
    module = stage_module.StageModule(staged.model, stage, staged.objectives, staged.rates)
    optimizer = module.configure_optimizers()
    save_last(
        folder / "last.ckpt", content_of(stage, 2, staged, optimizer, {}, [], seen(staged), set(), 0.0, True, STAMP)
    )
    return folder / "model.safetensors", folder / "last.ckpt"


def flipped(path: Path, place: int) -> None:
    octets = bytearray(path.read_bytes())
    for at in (place, place + 1):
        octets[at % len(octets)] ^= 0x15
    path.write_bytes(octets)


def test_two_flipped_bytes_anywhere_in_a_stages_file_are_seen(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    staged = entered()[0]
    staged.load(path, STAMP)
    whole, before = path.read_bytes(), [t.clone() for t in staged.kept().values()]
    for place in range(0, len(whole) - 1, 19):
        flipped(path, place)
        with pytest.raises(CheckpointError) as caught:
            staged.load(path, STAMP)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), place
        path.write_bytes(whole)
    assert all(torch.equal(a, b) for a, b in zip(before, staged.kept().values(), strict=True))


def test_flipped_bytes_of_a_checkpoint_are_seen_or_mean_nothing(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    staged, stage, _ = entered()
    whole = path.read_bytes()
    good = load_last(path, stage, staged, STAMP)
    assert good is not None
    seen = 0
    places = range(0, len(whole) - 1, 101)
    for place in places:
        flipped(path, place)
        try:
            saved = load_last(path, stage, staged, STAMP)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            seen += 1
        else:
            assert saved is not None and str(saved) == str(good), place
        path.write_bytes(whole)
    assert seen > len(places) / 4  # a small archive is padding for the most part
    for name, tensor in good["weights"].items():  # every bit of what is learnt
        at = whole.index(tensor.numpy().tobytes())
        flipped(path, at + 1)
        with pytest.raises(CheckpointError, match="is damaged: the checksum of"):
            load_last(path, stage, staged, STAMP)
        path.write_bytes(whole)
        assert name.startswith("connector")


@pytest.mark.parametrize("which", [0, 1], ids=["weights", "checkpoint"])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Stamp(4, "align", 0, STAMP.config), "belongs to another run .seed 3, here 4"),
        (Stamp(3, "align", 0, "f" * 16), "belongs to another run .configuration 0123456789abcdef, here ffff"),
        (Stamp(3, "align", 1, STAMP.config), "belongs to another run .index 0, here 1"),
        (Stamp(3, "tune", 0, STAMP.config), "stage"),
    ],
    ids=["seed", "configuration", "place", "stage"],
)
def test_another_runs_file_is_refused(tmp_path: Path, which: int, other: Stamp, words: str) -> None:
    path = written(tmp_path)[which]
    staged, stage, _ = entered()
    with pytest.raises(CheckpointError, match=words) as caught:
        if which:
            load_last(path, stage if other.stage == "align" else parse(config())[1], staged, other)
        else:
            staged.load(path, other)
    assert len(str(caught.value)) <= 300 + len(str(path))


@pytest.mark.parametrize("step", [10**9, 7, -1, 2.5, None, True, "2"])
def test_a_step_that_the_stage_does_not_have_is_refused(tmp_path: Path, step: Any) -> None:
    _, path = written(tmp_path)
    staged, stage, _ = entered()
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"step": step}, path)
    with pytest.raises(CheckpointError, match=f"is of step {step} and stage align has 6"):
        load_last(path, stage, staged, STAMP)


def test_files_of_before_load_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights, last = written(tmp_path)
    with safe_open(str(weights), framework="pt") as file:
        facts = json.loads(file.metadata()["vlmlab"])
    old = {key: value for key, value in facts.items() if key not in ("checksum", "run")}
    save_file(load_file(weights), str(weights), metadata={"vlmlab": json.dumps(old)})
    saved = torch.load(last, weights_only=True)
    saved.pop("run")
    torch.save(saved, last)
    staged, stage, _ = entered()
    staged.load(weights, STAMP)
    assert load_last(last, stage, staged, STAMP) is not None
    assert capsys.readouterr().err.count("carries no checksum and no name of its run") == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    run(config(), folder / "run")
    run(config(seed=4), folder / "other")
    return folder


def weights(folder: Path, stage: str = "1_tune") -> Path:
    return folder / "stages" / stage / "model.safetensors"


@pytest.mark.parametrize("what", ["seed", "stage", "damage"])
def test_a_finished_run_with_a_wrong_file_is_refused_by_all_who_read_it(
    finished: Path, tmp_path: Path, what: str
) -> None:
    there = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    if what == "seed":
        shutil.copy(weights(finished / "other"), weights(there))
    elif what == "stage":
        shutil.copy(weights(there, "0_align"), weights(there))
    else:
        flipped(weights(there), weights(there).stat().st_size - 50)  # after the header
    before = weights(there).read_bytes()
    words = {"seed": "seed 4, here 3", "stage": "of the stage align and not of tune", "damage": "is damaged"}[what]
    with pytest.raises(CheckpointError, match=words):
        load_trained(config(), there)
    (there / "result.json").unlink()
    with RunFolder(there) as opened, pytest.raises(CheckpointError, match=words):
        opened.open(plain(config()))
        train(config(), there, evaluate)
    assert weights(there).read_bytes() == before and not (there / "result.json").exists()


def test_a_moved_run_is_still_its_own(finished: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(finished / "run", tmp_path / "elsewhere"))
    load_trained(config(), moved)
    assert set(RunFolder(moved).env()["stages"]) == {"align", "tune"}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"trainer__threads": 2, "trainer__workers": 3, "evaluation": {"batch_size": 3}}, ("align", "tune")),
        ({"recipe__stages__tune__train__lm": 0.5}, ("align",)),
        ({"recipe__stages__align__steps": 2}, ("tune",)),
        ({"data__train__chat__size": 20}, ("align",)),
        ({"fake__dropout": 0.2}, ()),
    ],
    ids=str,
)
def test_stages_that_runs_have_in_common_have_one_hash(changes: dict[str, Any], same: tuple[str, ...]) -> None:
    hashes = [{s.name: stage_hash(plain(c), s) for s in parse(c)} for c in (config(), config(**changes))]
    assert {name for name in hashes[0] if hashes[0][name] == hashes[1][name]} == set(same)

"""``vlmlab.load``: the answers are those of the evaluation that ended the run, whatever was trained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image as Pillow

import vlmlab
from tests import tiny
from tests.test_conf import composed
from vlmlab.contracts.errors import CheckpointError, DataError, UserError
from vlmlab.contracts.sample import IMAGE_TAG
from vlmlab.evaluate.metrics.rows import read_rows
from vlmlab.loading import LoadedModel
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train

TRAINED = {
    "connector": ("recipe=frozen",),
    "adapter": ("recipe=two_stage", "adapter=lora"),
    "full": ("recipe=joint",),
}
SHORT = (
    "budget.max_steps=1", "budget.eval_limit=4", "data.benchmarks.world_test.max_new_tokens=3",
    "evaluation.held_out=[]", "evaluation.baselines=[]", "trainer.progress=false", "trainer.accelerator=cpu",
    "~data.benchmarks.world_captions", "~data.benchmarks.world_compositional",
)  # fmt: skip


def finished(where: Path, *overrides: str) -> Path:
    cfg = composed(*SHORT, *overrides)
    with RunFolder(where) as run:
        run.open(plain(cfg), list(overrides))
        train(cfg, where)
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("runs") / "full", *TRAINED["full"])


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return vlmlab.load(folder, device="cpu")


def told(run: Path, loaded: LoadedModel) -> tuple[list[str], list[str]]:
    """What the run's own evaluation said, and what the loaded model says to the same questions."""
    samples = instantiate(loaded.config.data.benchmarks.world_test.source)
    rows = read_rows(run / "predictions" / "world_test.jsonl")
    asked = [samples[i] for i in range(len(rows))]
    assert [sample.id for sample in asked] == [row.id for row in rows] and all(len(s.turns) == 1 for s in asked)
    now = [loaded.generate(s.images, s.turns[0].prompt, max_new_tokens=3, system=s.system) for s in asked]
    return [row.prediction for row in rows], now


@pytest.mark.parametrize("trained", ["connector", "adapter"])
def test_the_answers_are_those_of_the_evaluation(trained: str, tmp_path: Path) -> None:
    run = finished(tmp_path / trained, *TRAINED[trained])
    before, now = told(run, vlmlab.load(run, device="cpu"))
    assert before == now and any(before)


def test_a_run_may_have_moved(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "run")
    before, now = told(moved, vlmlab.load(str(moved), device="cpu"))
    assert before == now and any(before)


def test_loading_changes_no_random_number(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    vlmlab.load(folder, device="cpu")
    assert torch.equal(torch.rand(2), expected)


def test_an_image_is_a_file_a_picture_or_an_array(model: LoadedModel, tmp_path: Path) -> None:
    pixels = tiny.picture(1)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    kinds = (pixels, Pillow.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png"), [pixels])
    assert len({model.generate(kind, "what is it", max_new_tokens=4) for kind in kinds}) == 1
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert model.generate(tmp_path / "link.png", "a", max_new_tokens=2) == model.generate(pixels, "a", max_new_tokens=2)


def test_a_turned_picture_is_turned_upright(model: LoadedModel, tmp_path: Path) -> None:
    from vlmlab.loading import _image

    pixels = tiny.picture(2, (6, 9))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    Pillow.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Pillow.open(tmp_path / "turned.png") as opened:
        assert np.array_equal(_image(opened), _image(tmp_path / "turned.png")) and _image(opened).shape == (9, 6, 3)
    grey = Pillow.fromarray(np.full((4, 4), 65535, np.uint16))
    assert (_image(grey) == 255).all()
    deep = Pillow.fromarray(np.array([[0, 2048, 4095]], np.uint16))  # by the range that the run's data were read with
    deep.save(tmp_path / "deep.png")
    assert [_image(one, [0, 4095])[0, :, 0].tolist() for one in (deep, tmp_path / "deep.png")] == [[0, 128, 255]] * 2
    with pytest.raises(UserError, match=r"the image of mode F cannot be read .its pixels are not finite.; convert it"):
        _image(Pillow.fromarray(np.array([[np.nan]], np.float32)))


def test_no_image_several_images_and_sampling(model: LoadedModel) -> None:
    one, other = tiny.picture(1), tiny.picture(2)
    assert isinstance(model.generate(None, "how many", max_new_tokens=2), str)
    tagged = model.generate([one, other], f"{IMAGE_TAG} and {IMAGE_TAG} what", max_new_tokens=2)
    assert isinstance(tagged, str) and isinstance(model.generate((one, other), "what", max_new_tokens=2), str)
    told = []
    for _ in range(2):
        torch.manual_seed(3)
        told.append(model.generate(one, "what", max_new_tokens=6, do_sample=True, temperature=5.0, top_p=0.95))
    assert told[0] == told[1] and "parameters on cpu" in repr(model)


@pytest.mark.parametrize(
    ("image", "question", "options", "message"),
    [
        (None, f"{IMAGE_TAG} and {IMAGE_TAG}?", {}, "has 2 <image> tags and there are no images; give as many"),
        (1, f"{IMAGE_TAG}{IMAGE_TAG}", {}, "has 2 <image> tags and there is 1 image;"),
        ("nowhere.png", "what", {}, "nowhere.png is no file"),
        (3.5, "what", {}, "the image is a float; give a path"),
        (np.zeros((4, 4), np.uint8), "what", {}, r"array of uint8 \(4, 4\)"),
        (1, "what", {"temprature": 1.0}, "temprature is no option of transformers' generate"),
        (1, "what", {"max_new_tokens": 0}, "max_new_tokens=0 is not possible"),
        (1, "what", {"num_return_sequences": 2}, "num_return_sequences=2 is not possible"),
    ],
)
def test_mistakes_are_one_sentence(
    image: object, question: str, options: dict[str, object], message: str, model: LoadedModel
) -> None:
    given = tiny.picture(1) if isinstance(image, int) else image
    with pytest.raises(UserError, match=message) as caught:
        model.generate(given, question, **options)
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_named(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        model.generate(tmp_path / "broken.jpg", "what")


def test_wrong_folders_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder \(it has no config.yaml\)"):
        vlmlab.load(tmp_path / "nothing")
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not finished \(no result.json\)"):
        vlmlab.load(unfinished)
    gone = shutil.copytree(folder, tmp_path / "gone")
    for file in gone.glob("stages/*/model.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        vlmlab.load(gone)
    with pytest.raises(UserError, match=r"lm\.pth is no key"):
        vlmlab.load(folder, {"lm.pth": "x"})
    with pytest.raises(UserError, match="device=tpus is unknown"):
        vlmlab.load(folder, device="tpus")


def test_weights_of_another_tower_are_refused(folder: Path) -> None:
    lm = {"_target_": "vlmlab.lm.hf.HfLanguageModel", "path": str(tiny.qwen2())}
    with pytest.raises(CheckpointError, match="was trained on another lm"):
        vlmlab.load(folder, {"lm": lm})


def test_the_package_is_imported_at_once() -> None:
    code = "import sys, vlmlab; print([n for n in ('torch', 'numpy', 'omegaconf', 'PIL') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = vlmlab.lod

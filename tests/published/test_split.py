"""A run made of a published model is a run as any other: loaded, scored, tuned, exported, under another mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.published import models
from tests.published.splitting import imported
from tests.test_conf import composed
from tests.test_loading import SHORT, finished

import vlmlab
from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.engine.weights import read_facts
from vlmlab.export import export
from vlmlab.mask.bidir import Bidirectional
from vlmlab.published.model import find
from vlmlab.published.split import split_model
from vlmlab.runs.folder import RunFolder

FILE = "stages/0_published/model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(models.llava(), tmp_path_factory.mktemp("published") / "run", *SHORT)


def test_it_is_finished_and_says_where_it_came_from(run: Path) -> None:
    folder = RunFolder(run)
    config, result = folder.finished(), folder.result()
    assert folder.trained() and folder.state()["state"] == "done"
    assert result is not None and result["metrics"] == {} and result["cost"]["trainable"] == 0
    assert config["mask"]["_target_"].endswith("Causal") and config["encoder"]["layers"] == [-2]
    assert folder.env()["published"] == {"path": str(models.llava()), "class": "LlavaForConditionalGeneration"}
    facts = read_facts(run / FILE)
    assert facts["stage"] == "published" and set(facts["sources"]) == {"encoder", "lm"}
    assert all(name.startswith("connector.") for name in load_file(run / FILE))


def test_it_answers(run: Path) -> None:
    model = vlmlab.load(run, device="cpu")
    said = [model.generate(tiny.picture(k), "what colour is it", max_new_tokens=6) for k in (1, 2)]
    assert all(isinstance(answer, str) for answer in said) and "HfLanguageModel" in repr(model)


def test_it_is_tuned(run: Path, tmp_path: Path) -> None:
    words = find(str(models.llava())).words(run)[:-1]
    tuned = finished(tmp_path / "tuned", *words, f"init_from={run}", "recipe=joint", "recipe.stages.joint.train.lm=0")
    first, last = (
        load_file(next(folder.glob("stages/*/model.safetensors")))["connector.layers.0.weight"]
        for folder in (run, tuned)
    )
    moved = (first - last).abs()
    assert 0 < float(moved.max()) < 0.01, "one step from the published weights, not from new ones"


def test_another_mask_on_the_same_weights(run: Path, tmp_path: Path) -> None:
    found = find(str(models.llava()))
    words = [word for word in found.words(tmp_path / "open") if not word.startswith("mask=")] + ["mask=bidir", *SHORT]
    split_model(found, composed(*words), tmp_path / "open", words)
    assert isinstance(vlmlab.load(tmp_path / "open", device="cpu").model.mask, Bidirectional)
    one, other = load_file(run / FILE), load_file(tmp_path / "open" / FILE)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_is_exported(tmp_path: Path) -> None:
    """Also with a tower of a family that has no image processor by name."""
    run = imported(models.blip2_llama(), tmp_path / "run")
    out = tmp_path / "out"
    assert set(export(run, out, form="parts")) == {"lm", "encoder", "connector"}
    for part in ("lm", "encoder"):
        before, after = (load_file(folder / part / "model.safetensors") for folder in (run, out))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert HfEncoder(str(out / "encoder"), layers=[-1], class_token=True).hw == (1, 17)


def test_a_place_that_is_taken_or_weights_that_lack_leave_nothing(run: Path, tmp_path: Path) -> None:
    found = find(str(models.llava()))
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match="has files in it; give a new or empty folder"):
        split_model(found, composed(*found.words(run)), run)
    assert sorted(run.rglob("*")) == before
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in models.llava().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(models.llava() / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("linear_1.weight"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks .*linear_1.weight.* of its weights"):
        imported(folder, tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_the_result_has_no_scores_to_compare(run: Path) -> None:
    assert json.loads((run / "result.json").read_text())["config_hash"]

"""``mix``: a stage's weights become those of two runs in shares."""

import json

import pytest
import torch
from fake_lab import config, run
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.engine.restore import load_trained
from vlmlab.recipe.stage import parse


def weights(folder, stage="1_tune"):
    return load_file(folder / "stages" / stage / "model.safetensors")


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    for seed in (3, 4):
        run(config(seed=seed), folder / str(seed))
    return folder


def mixed(tmp_path, parents, share, **changes):
    mix = {"run": str(parents / "4"), "share": share, **changes}
    cfg = config(seed=3, recipe__stages__tune__mix=mix)
    run(cfg, tmp_path / "run")
    return cfg


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_it_is_the_formula_and_at_its_ends_a_parent(tmp_path, parents, share):
    cfg = mixed(tmp_path, parents, share)
    mine, other, found = weights(parents / "3"), weights(parents / "4"), weights(tmp_path / "run")
    assert found.keys() == mine.keys()
    for name, tensor in found.items():
        if share in (0.0, 1.0):
            assert torch.equal(tensor, mine[name] if share else other[name])
        else:
            want = share * mine[name] + (1 - share) * other[name]
            torch.testing.assert_close(tensor, want, atol=1e-6, rtol=0)
            assert not torch.equal(tensor, mine[name])
    state = load_trained(cfg, tmp_path / "run").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.items())


def test_a_run_that_is_not_there_is_refused_before_the_first_step(tmp_path, parents):
    with pytest.raises(
        UserError, match=r"recipe\.stages\.tune\.mix: .* no finished stage tune2 \(there: align, tune\)"
    ):
        mixed(tmp_path, parents, 0.5, stage="tune2")
    assert not (tmp_path / "run" / "stages").exists()


def test_another_composition_is_refused(tmp_path, parents):
    from vlmlab.engine.weights import mixed_in

    cfg = config(recipe__stages__tune__mix={"run": str(parents / "4")})
    stage = parse(cfg)[1]
    assert mixed_in(stage, cfg) == parents / "4" / "stages" / "1_tune" / "model.safetensors"
    OmegaConf.update(cfg, "connector", {"_target_": "other"}, force_add=True)
    with pytest.raises(CheckpointError, match="has another connector"):
        mixed_in(stage, cfg)


def test_a_run_made_before_classes_moved_has_the_same_composition(tmp_path):
    from vlmlab.engine.weights import COMPOSITION, FORMAT, mixed_in, plain_key

    folder = tmp_path / "stages" / "1_tune"
    folder.mkdir(parents=True)
    cfg = config(recipe__stages__tune__mix={"run": str(tmp_path)})
    OmegaConf.update(cfg, "connector", {"words": {"_target_": "vlmlab.data.readers.llava.LlavaJson"}}, force_add=True)
    saved = {key: plain_key(cfg, key) for key in COMPOSITION}
    saved["connector"] = {"words": {"_target_": "vlmlab.data.llava.LlavaJson"}}
    facts = json.dumps({"format": FORMAT, "composition": saved})
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"vlmlab": facts})
    assert mixed_in(parse(cfg)[1], cfg) == folder / "model.safetensors"


def test_another_stages_tensors_are_refused(tmp_path, parents):
    with pytest.raises(CheckpointError, match="lacks"):
        mixed(tmp_path, parents, 0.5, stage="align")

import json

import pytest
import torch
from fake_lab import FakeVLM, config, run
from safetensors.torch import load_file, save_file

from vlmlab.contracts.errors import CheckpointError
from vlmlab.engine.restore import load_trained
from vlmlab.engine.weights import StagedModel
from vlmlab.recipe.stage import parse


@pytest.fixture
def saved(tmp_path):
    cfg = config()
    stage = parse(cfg)[0]
    staged = StagedModel(FakeVLM())
    staged.enter(stage)
    path = tmp_path / "model.safetensors"
    staged.save(path, stage, cfg)
    return path, stage


def fresh(stage, **changes):
    staged = StagedModel(FakeVLM())
    for name, value in changes.items():
        setattr(staged.model, name, value)
    staged.enter(stage)
    return staged


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, str(path), metadata=metadata)


def test_it_holds_what_no_tower_has_and_loads_again(saved):
    path, stage = saved
    assert sorted(load_file(path)) == ["connector.bias", "connector.weight"]
    staged = fresh(stage)
    staged.load(path)
    assert torch.equal(staged.model.connector.weight.data, load_file(path)["connector.weight"])
    assert staged.model.connector.weight.requires_grad


def test_metadata_says_what_it_belongs_to(saved):
    from safetensors import safe_open

    with safe_open(str(saved[0]), framework="pt") as file:
        facts = json.loads(file.metadata()["vlmlab"])
    assert facts["format"] == 1
    assert facts["sources"] == {"encoder": "a" * 64, "lm": "b" * 64}
    assert set(facts["composition"]) == {"encoder", "connector", "fusion", "lm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("connector.bias"), r"lacks connector\.bias"),
        (lambda t: t.update(other=torch.zeros(1)), r"also has other"),
        (lambda t: t.update({"connector.bias": torch.zeros(3)}), r"bias is \(3,\) and the model's is \(8,\)"),
    ],
)
def test_loading_is_strict(saved, change, message):
    path, stage = saved
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        fresh(stage).load(path)


def test_other_towers_are_refused(saved):
    path, stage = saved
    with pytest.raises(CheckpointError, match=r"trained on another encoder \(sha256 aaaaaaaaaaaa, here cccccccccccc\)"):
        fresh(stage, hash="c" * 64).load(path)


def test_a_torn_file_is_refused(saved):
    path, stage = saved
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        fresh(stage).load(path)


def test_a_finished_run_loads_whole(tmp_path):
    cfg = config(recipe__stages__tune__adapter={"_target_": "fake_lab.FakeAdapter"})
    run(cfg, tmp_path)
    model = load_trained(cfg, tmp_path)
    kept = load_file(tmp_path / "stages" / "1_tune" / "model.safetensors")
    assert {"adapter.weight", "connector.weight", "lm.head.weight"} <= kept.keys()
    state = model.state_dict()
    for name, tensor in kept.items():
        assert torch.equal(state[name], tensor)
    assert not model.training


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        load_trained(config(), tmp_path)

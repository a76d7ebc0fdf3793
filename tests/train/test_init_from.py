import json
import shutil

import pytest
import torch
from fake_lab import FakeVLM, config, run
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from vlmlab.contracts.errors import CheckpointError, UserError
from vlmlab.engine.begin import begin_with, fits_as_built
from vlmlab.engine.restore import enter, load_trained
from vlmlab.engine.stage import StageModule
from vlmlab.engine.stamp import checksum
from vlmlab.engine.weights import StagedModel, read_facts
from vlmlab.recipe.stage import parse
from vlmlab.runs.config import config_hash, plain
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.origin import FILE, KEPT, check_origin, find_origin

ADAPTER = {"_target_": "fake_lab.FakeAdapter"}


def whole(**changes):
    return config(**changes)


def tail(source, **changes):
    """The second stage alone, from an earlier run's first."""
    cfg = config(init_from=str(source), **changes)
    del cfg.recipe.stages.align
    return cfg


def last(folder):
    return load_file(sorted(folder.glob("stages/*/model.safetensors"))[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run of both stages."""
    folder = tmp_path_factory.mktemp("source") / "run"
    run(whole(), folder)
    return folder


@pytest.fixture(scope="module")
def begun_run(source, tmp_path_factory):
    """Another run of both stages, from that one."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(config(init_from=str(source)), folder)
    return folder


class Stop(Exception):
    """Ends a run as abruptly as a test can without a process of its own."""


def stopped(cfg, folder, steps, monkeypatch):
    """Train and stop within an optimizer step, counted from 0 over all stages; every step ends with a checkpoint."""
    left, real = [steps], StageModule.on_before_optimizer_step

    def stopping(self, optimizer):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        real(self, optimizer)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(StageModule, "on_before_optimizer_step", stopping)
        run(cfg, folder)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_align_once_tune_many_equals_a_run_in_one_piece(source, tmp_path):
    run(tail(source / "align"), tmp_path)
    same(last(tmp_path), last(source))
    assert not (tmp_path / KEPT).exists()
    known = json.loads((tmp_path / FILE).read_text())
    assert known["file"].endswith("stages/0_align/model.safetensors") and len(known["sha256"]) == 64


def test_the_last_stage_or_the_named_one(source):
    assert find_origin(str(source)).parent.name == "1_tune"
    assert find_origin(f"{source}/align").parent.name == "0_align"
    with pytest.raises(UserError, match=r"stage nothing of .* is not finished \(finished: align, tune\)"):
        find_origin(f"{source}/nothing")
    with pytest.raises(UserError, match="is neither a run folder nor a stage of one"):
        find_origin(str(source.parent / "missing"))


def test_the_last_stage_of_a_run_that_stopped_before_it(source, tmp_path):
    shutil.copytree(source, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/stages/1_tune")
    with pytest.raises(UserError, match=r"stage tune of .* is not finished \(finished: align\); give one that is"):
        find_origin(str(tmp_path / "run"))


def test_a_tower_that_was_trained_is_kept_by_every_later_file_and_the_run_stands_alone(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    changes = {"recipe__stages__tune__train": {"connector": 1e-3}}  # the LM is frozen and still not the tower's
    cfg = tail(copy, **changes)
    run(cfg, tmp_path / "run")
    kept, before = last(tmp_path / "run"), last(source)
    assert torch.equal(kept["lm.head.weight"], before["lm.head.weight"])
    assert not torch.equal(kept["connector.weight"], before["connector.weight"])
    assert "lm.head.weight" in read_facts(tmp_path / "run/stages/0_tune/model.safetensors")["begun"]
    shutil.rmtree(copy)
    state = load_trained(cfg, tmp_path / "run").state_dict()
    for name, tensor in kept.items():
        assert torch.equal(state[name], tensor)
    with RunFolder(tmp_path / "run") as opened:
        assert opened.open(plain(cfg)) is not None
    check_origin(tmp_path / "run", cfg.init_from)
    run(tail(tmp_path / "run", **changes), tmp_path / "next")  # and from that one
    assert torch.equal(last(tmp_path / "next")["lm.head.weight"], before["lm.head.weight"])


@pytest.mark.parametrize("step", [3, 8])  # within the first stage, and the second
def test_a_run_that_was_stopped_goes_on_without_its_source(source, begun_run, tmp_path, step, monkeypatch):
    cfg = config(init_from=str(tmp_path / "source"))
    shutil.copytree(source, tmp_path / "source")
    stopped(cfg, tmp_path / "run", step, monkeypatch)
    shutil.rmtree(tmp_path / "source")
    run(cfg, tmp_path / "run")
    same(last(tmp_path / "run"), last(begun_run))


def test_another_content_between_stop_and_resume_is_refused(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "source")
    cfg = config(init_from=str(tmp_path / "source"))
    stopped(cfg, tmp_path / "run", 3, monkeypatch)
    file = tmp_path / "source/stages/1_tune/model.safetensors"
    tensors, facts = load_file(file), {"vlmlab": json.dumps(read_facts(file))}
    file.unlink()
    save_file(tensors, str(file), metadata=facts)  # written again, the same
    check_origin(tmp_path / "run", cfg.init_from)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, str(file), metadata=facts)
    with pytest.raises(UserError, match=r"init_from=.* has other weights now .* fresh=true"):
        run(cfg, tmp_path / "run")
    with pytest.raises(UserError, match="other weights now"):
        check_origin(tmp_path / "run", cfg.init_from)
    check_origin(tmp_path / "run", cfg.init_from, fresh=True)


def test_a_source_that_is_missing_is_said_before_anything_else(tmp_path):
    with pytest.raises(UserError, match=r"init_from=.* is neither a run folder"):
        check_origin(tmp_path, str(tmp_path / "nowhere"))
    check_origin(tmp_path, None)


def begun(cfg, path, model=None):
    stage = parse(cfg)[0]
    staged = StagedModel(model or FakeVLM())
    if not fits_as_built(staged, path):
        enter(staged, cfg, stage)
    notes = begin_with(staged, path, cfg)
    return staged, notes


def rewritten(source, tmp_path, change):
    file = find_origin(f"{source}/align")
    tensors, facts = load_file(file), read_facts(file)
    change(tensors, facts)
    facts["checksum"] = checksum(facts, tensors)
    path = tmp_path / "model.safetensors"
    save_file(tensors, str(path), metadata={"vlmlab": json.dumps(facts)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f: t.update({"connector.bias": torch.zeros(3)}), r"the connector does not fit.*shape \(3,\), here"),
        (
            lambda t, f: t.update({"fusion.gate": torch.zeros(3)}),
            r"the fusion does not fit.*fusion\.gate, which this one has not",
        ),
        (lambda t, f: t.pop("connector.bias"), r"the connector does not fit.*lacks connector\.bias"),
        (
            lambda t, f: f["composition"].update(connector={"_target_": "a.Other"}),
            r"connector .*is a Other, here it is",
        ),
        (lambda t, f: f["sources"].update(encoder="c" * 64), r"another encoder \(sha256 cccccccccccc"),
    ],
)
def test_a_part_that_does_not_fit_is_named(source, tmp_path, change, message):
    path = rewritten(source, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        begun(config(init_from="outputs/earlier"), path)
    assert str(error.value).startswith("init_from=outputs/earlier") and len(str(error.value)) <= 300


def test_a_damaged_source_is_refused(source, tmp_path):
    path = rewritten(source, tmp_path, lambda t, f: None)
    octets = bytearray(path.read_bytes())
    octets[-7] ^= 1
    path.write_bytes(octets)
    with pytest.raises(CheckpointError, match="is damaged: its checksum"):
        begun(config(), path)


def test_other_settings_of_a_part_are_said(source, tmp_path):
    path = rewritten(source, tmp_path, lambda t, f: f["composition"].update(connector={"_target_": "a.B", "depth": 1}))
    _, notes = begun(config(connector={"_target_": "a.B", "depth": 2}), path)
    assert notes == ["connector.depth=2 here, 1 where the weights were trained"]


def test_weights_of_an_objective_stay_behind(source, tmp_path):
    path = rewritten(source, tmp_path, lambda t, f: t.update({"objectives.itc.scale": torch.zeros(1)}))
    staged, _ = begun(config(), path)
    assert staged.begun() == ["connector.bias", "connector.weight"]


def test_an_adapter_comes_where_the_first_stage_has_it_too(tmp_path):
    adapted = {"recipe__stages__align__adapter": ADAPTER, "recipe__stages__tune__adapter": ADAPTER}
    run(config(**adapted), tmp_path / "source")
    run(tail(tmp_path / "source/align", recipe__stages__tune__adapter=ADAPTER), tmp_path / "run")
    same(last(tmp_path / "run"), last(tmp_path / "source"))
    with pytest.raises(CheckpointError, match=r"the adapter does not fit.*adapter\.\w+, which this one has not"):
        run(tail(tmp_path / "source/align"), tmp_path / "plain")


def test_weights_from_before_an_adapter_go_under_it(source, tmp_path):
    run(tail(source, recipe__stages__tune__adapter=ADAPTER, recipe__stages__tune__train={"connector": 1e-3}), tmp_path)
    assert torch.equal(last(tmp_path)["connector.weight"], last(source)["connector.weight"])
    assert "adapter.weight" in last(tmp_path)


def test_without_it_a_folder_is_that_of_a_time_before_the_key():
    old = plain(config())
    assert config_hash(old) == config_hash(plain(config(init_from=None)))
    assert config_hash(old) != config_hash(plain(config(init_from="outputs/run")))


def test_the_key_is_in_the_configuration():
    from tests.test_conf import CONF

    assert OmegaConf.load(CONF / "train.yaml").init_from is None

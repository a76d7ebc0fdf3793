import json

import pytest
import tower_lab
from fake_lab import config, run

from vlmlab.contracts.errors import Unscored, UserError
from vlmlab.runs.config import plain
from vlmlab.runs.folder import RunFolder
from vlmlab.train.run import train


def test_a_run_leaves_its_files(tmp_path, capsys):
    result = run(config(), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["metrics"] == {"fake/accuracy": 0.5}
    cost = result["cost"]
    assert cost["params"] == 408 + 72 + 823
    assert cost["trainable"] == 72 + 823
    assert cost["visual_tokens"] == 0, "nothing is in the sequence"
    assert cost["flops_sample"] > 0 and cost["seconds"] > 0 and cost["peak_bytes"] > 1e6
    assert json.loads((tmp_path / "cost.json").read_text()) == cost
    said = capsys.readouterr().out
    assert "stage 1 of 2: align" in said
    assert [line.split() for line in said.splitlines() if line.startswith("lm ")] == [
        ["lm", "823", "-", "frozen"],
        ["lm", "823", "823", "0.001"],
    ]
    assert "precision fp32 (asked for)" in said
    rows = RunFolder(tmp_path).metrics()
    assert [(row["stage"], row["step"]) for row in rows if "loss" in row] == [
        *(("align", step) for step in range(1, 7)),
        *(("tune", step) for step in range(1, 6)),
    ]
    assert {"tokens", "labelled_fraction", "samples_per_s", "gradient_norm", "lr/connector"} <= rows[0].keys()


def test_rows_every_few_steps_and_always_the_last(tmp_path):
    run(config(trainer__log_every=4), tmp_path)
    rows = [row["step"] for row in RunFolder(tmp_path).metrics() if row["stage"] == "align" and "loss" in row]
    assert rows == [1, 4, 6]


def test_debug_steps_ends_early_and_is_not_evaluated(tmp_path):
    assert run(config(debug__steps=2), tmp_path) is None
    assert [row["step"] for row in RunFolder(tmp_path).metrics() if "loss" in row] == [1, 2]
    assert not (tmp_path / "result.json").exists()


def test_debug_overfit_sees_few_samples(tmp_path):
    cfg = config(fake__dropout=0.0, debug__overfit=8, recipe__stages__align__steps=40)
    cfg.recipe.stages.align.train = {"connector": 0.05, "lm": 0.05}
    run(cfg, tmp_path)
    rows = [row for row in RunFolder(tmp_path).metrics() if row["stage"] == "align" and "loss" in row]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert len({row["tokens"] for row in rows}) == 1  # always the same eight


def test_debug_profile_writes_a_table(tmp_path):
    run(config(debug__profile=True, debug__steps=2), tmp_path)
    assert "aten::" in (tmp_path / "profile.txt").read_text()


def test_a_recipe_that_trains_nothing_is_refused(tmp_path):
    cfg = config()
    for stage in cfg.recipe.stages.values():
        stage.train = {"fusion": 1e-3}
    with pytest.raises(UserError, match="trains nothing"):
        run(cfg, tmp_path)


def test_a_stage_without_weights_is_passed_over(tmp_path, capsys):
    run(config(recipe__stages__align__train={"fusion": 1e-3}), tmp_path)
    assert "nothing to train here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe__stages__tune__module": "fake_lab.Nothing"}, r"recipe\.stages\.tune\.module"),
        ({"recipe__stages__tune__module": "fake_lab.FakeLoss"}, r"is not a StageModule"),
        ({"objective": {"_target_": "fake_lab.FakeLoss", "per_micro_batch": True}}, "accumulate=2"),
        ({"precision__name": "fp8"}, "precision.name=fp8"),
    ],
)
def test_mistakes_are_found_before_the_first_step(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(config(**change), tmp_path)
    assert not RunFolder(tmp_path).metrics()


def test_weights_decay_only_in_matrices_and_rates_follow_parts():
    from fake_lab import FakeInstruction, FakeLoss, FakeVLM

    from vlmlab.engine.weights import StagedModel
    from vlmlab.recipe.stage import parse

    stage = parse(config())[1]
    staged = StagedModel(FakeVLM())
    staged.enter(stage)
    module = FakeInstruction(staged.model, stage, {"lm": FakeLoss()}, staged.rates)
    groups = module.configure_optimizers().param_groups
    decays = {(g["part"], g["weight_decay"]): {p.ndim >= 2 for p in g["params"]} for g in groups}
    assert decays == {
        ("connector", 0.1): {True}, ("connector", 0.0): {False}, ("lm", 0.1): {True}, ("lm", 0.0): {False},
    }  # fmt: skip
    assert not staged.model.encoder.training and staged.model.lm.training


def test_a_fusion_that_nothing_trains_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"joint.train: the fusion has .* add \+recipe.stages.joint.train.fusion"):
        run(tower_lab.config("fusion=lavi"), tmp_path)
    assert not (tmp_path / "stages").exists()


def test_a_run_whose_benchmark_fails_is_trained_and_scored_as_far_as_it_goes(tmp_path, capsys):
    def unscored(model, cfg, folder):
        raise Unscored({"toy/score": 0.5}, {"other": "too long"})

    with RunFolder(tmp_path) as opened:
        opened.open(plain(config()))
        with pytest.raises(Unscored, match="other could not be scored"):
            train(config(), tmp_path, unscored)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failed"] == {"other": "too long"} and result["metrics"] == {"toy/score": 0.5}
    assert result["cost"]["params"] and RunFolder(tmp_path).trained()
    rows = len(RunFolder(tmp_path).metrics())
    assert "is finished already" not in capsys.readouterr().out
    again = run(config(), tmp_path)
    assert capsys.readouterr().out.count("is finished already") == 2 and len(RunFolder(tmp_path).metrics()) == rows
    assert again["metrics"] == {"fake/accuracy": 0.5} and "failed" not in again

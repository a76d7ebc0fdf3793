from itertools import pairwise

import pytest
from omegaconf import OmegaConf

from vlmlab.contracts.errors import UserError
from vlmlab.recipe.stage import Stage, leads, parse


def config(**stage):
    whole = {"module": "a.B", "train": {"connector": 1e-3}, "data": "short", "steps": 10, "batch_size": 8, **stage}
    return OmegaConf.create(
        {
            "mask": {"_target_": "m.M"},
            "objective": {"_target_": "o.O"},
            "adapter": {"_target_": "a.A"},
            "data": {"train": {"short": {}, "long": {}}},
            "trainer": {"gradient_clip": 1.0, "devices": 2},
            "budget": {"steps_scale": 1.0, "max_steps": None},
            "debug": {"steps": None},
            "recipe": {"stages": {"one": whole}},
        }
    )


def test_defaults_come_from_the_groups():
    (stage,) = parse(config())
    chosen = (stage.mask, stage.objective, stage.adapter)
    assert chosen == ({"_target_": "m.M"}, {"_target_": "o.O"}, {"_target_": "a.A"})
    assert stage.gradient_clip == 1.0
    assert stage.betas == (0.9, 0.999)
    assert stage.train == {"connector": 1e-3}


def test_a_stage_is_left_out_by_no_steps_but_not_all_of_them():
    cfg = config(steps=0)
    with pytest.raises(UserError, match=r"^recipe.stages.one.steps is 0, .* nothing is trained"):
        parse(cfg)
    cfg.recipe.stages.two = {**cfg.recipe.stages.one, "steps": 3}
    assert [stage.steps for stage in parse(cfg)] == [0, 3]


def test_null_turns_off_what_has_an_off_choice():
    (stage,) = parse(config(adapter=None, gradient_clip=None, train={"connector": 1e-3, "encoder": None}))
    assert stage.adapter is None
    assert stage.gradient_clip is None
    assert stage.train == {"connector": 1e-3}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train": {"conector": 1e-3}}, "train.conector"),
        ({"train": {}}, "train"),
        ({"train": {"connector": {"out": None}}}, "train"),
        ({"train": {"connector.": 1e-3}}, "train.connector"),
        ({"train": {"connector.out": "fast"}}, "train.connector.out"),
        ({"train": {"brain.out": 1e-3}}, "train.brain"),
        ({"train": {"lm": None}}, "train"),
        ({"train": {"lm": "fast"}}, "train.lm"),
        ({"train": {"lm": -1.0}}, "train.lm"),
        ({"data": "shrot"}, "data"),
        ({"prompt": "chatty"}, "prompt"),
        ({"schedule": "cosin"}, "schedule"),
        ({"optimizer": "moun"}, "optimizer"),
        ({"layers": [0, 1]}, "layers"),
        ({"layers": {"connector": [0, 1]}}, "layers.connector"),
        ({"layers": {"lm": [0, 1]}}, "layers.lm"),  # frozen
        ({"train": {"lm": 1e-3}, "layers": {"lm": [1, 0]}}, "layers.lm"),
        ({"train": {"lm": 1e-3}, "layers": {"lm": 2}}, "layers.lm"),
        ({"train": {"lm": 1e-3}, "layers": {"lm": [0.5, 1]}}, "layers.lm"),
        ({"train": {"lm": 1e-3}, "layer_decay": 0.0}, "layer_decay"),
        ({"train": {"lm": 1e-3}, "layer_decay": 1.1}, "layer_decay"),
        ({"layer_decay": 0.9}, "layer_decay"),  # nothing with layers trains
        ({"mix": "a/run"}, "mix"),
        ({"mix": {"run": "a", "shares": 0.5}}, "mix.shares"),
        ({"mix": {"run": "a", "share": 1.5}}, "mix.share"),
        ({"batch_size": 6, "accumulate": 2}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": None}, "steps"),
        ({"accumulate": True}, "accumulate"),
        ({"warmup": 3}, "warmup"),
        ({"min_lr_ratio": -0.1}, "min_lr_ratio"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"betas": [0.9]}, "betas"),
        ({"gradient_clip": 0}, "gradient_clip"),
        ({"module": "AlignmentModule"}, "module"),
        ({"lr": 1e-3}, "lr"),
    ],
)
def test_a_mistake_names_its_key(change, key):
    with pytest.raises(UserError, match=rf"^recipe\.stages\.one\.{key}\b") as caught:
        parse(config(**change))
    assert "\n" not in str(caught.value)


def test_budget_scales_and_caps_steps():
    cfg = config(steps=30)
    cfg.budget.steps_scale = 0.1
    assert parse(cfg)[0].steps == 3
    cfg.budget.steps_scale = 0.05
    assert parse(cfg)[0].steps == 2
    cfg.budget.max_steps = 1
    assert parse(cfg)[0].steps == 1


def test_debug_steps_keeps_only_the_first_stage():
    cfg = config()
    cfg.recipe.stages.two = cfg.recipe.stages.one
    cfg.debug.steps = 3
    assert [(stage.name, stage.steps) for stage in parse(cfg)] == [("one", 3)]


def stage_with(**keys):
    return Stage(0, "s", "a.B", {"lm": 1.0}, "short", {}, steps=100, batch_size=1, **keys)


def test_learning_rate_rises_then_follows_the_cosine():
    stage = stage_with(warmup=0.1, min_lr_ratio=0.1)
    factors = [stage.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)  # the middle of the cosine
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert 0.1 < factors[-1] < 0.11


def test_other_schedules():
    assert stage_with(warmup=0.0, schedule="constant").factor(99) == 1.0
    assert stage_with(warmup=0.0, schedule="linear").factor(25) == pytest.approx(0.75)


def test_layers_and_mix():
    keys = {"train": {"lm": 1e-3}, "layers": {"lm": [-2, -1], "encoder": None}, "layer_decay": 0.9}
    (stage,) = parse(config(**keys, mix={"run": "a/run"}))
    assert stage.layers == {"lm": (-2, -1)} and stage.layer_decay == 0.9
    assert stage.mix == {"run": "a/run", "share": 0.5, "stage": "one"}


def test_paths_inside_parts_may_be_nested_or_dotted():
    (stage,) = parse(
        config(train={"connector": {"out": 1e-3, "qformer": None}, "lm.**.self_attn": 2e-3, "encoder": None})
    )
    assert stage.train == {"connector.out": 1e-3, "connector.qformer": None, "lm.**.self_attn": 2e-3}
    assert stage.rates == {"connector.out": 1e-3, "lm.**.self_attn": 2e-3}
    assert [stage.trains(part) for part in ("connector", "lm", "encoder")] == [True, True, False]
    assert stage.deciding("lm", "lm.model.layers.0.self_attn.q_proj.weight") == "lm.**.self_attn"
    assert stage.deciding("lm", "lm.model.layers.0.mlp.up_proj.weight") is None
    assert stage.deciding("lm.base", "lm.model.layers.0.self_attn.q_proj.weight") is None


def test_the_longest_path_decides():
    (stage,) = parse(config(train={"connector": 1e-3, "connector.out": 1e-4, "connector.out.bias": None}))
    names = ("connector.in.weight", "connector.out.weight", "connector.out.bias", "connector.outer.bias")
    found = [stage.deciding("connector", name) for name in names]
    assert found == ["connector", "connector.out", "connector.out.bias", "connector"]
    assert stage.rates == {"connector": 1e-3, "connector.out": 1e-4}


@pytest.mark.parametrize(
    ("path", "leads_to", "not_to"),
    [
        ("lm.layers.*.mlp", "layers.3.mlp.up.weight", "layers.3.self_attn.q.weight"),
        ("lm.layers.1?", "layers.12.mlp.up.weight", "layers.1.mlp.up.weight"),
        ("lm.**.*_proj.bias", "a.b.q_proj.bias", "a.b.q_proj.weight"),
        ("lm.**", "a.b", None),
        ("lm.**.norm", "norm.weight", "abnorm.weight"),
    ],
)
def test_wildcards(path, leads_to, not_to):
    assert leads(path, leads_to.split("."))
    assert not_to is None or not leads(path, not_to.split("."))

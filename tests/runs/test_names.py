from __future__ import annotations

import re

import pytest

from vlmlab.runs.names import LONGEST, cell_name, override_key, run_name, sweep_name


def test_a_cell_is_named_by_its_overrides_in_their_order() -> None:
    assert cell_name(["connector=mlp", "mask=bidir", "seed=1"]) == "connector-mlp_mask-bidir_seed-1"
    assert cell_name(["recipe.stages.align.steps=10"]) == "recipe.stages.align.steps-10"
    assert cell_name([]) == "default"


@pytest.mark.parametrize(
    "overrides",
    [["data.path=/a b/c.json"], ["+x=1"], ["x=[1,2]"], ["x={a:1}", "y='q'"], ["~x"], ["x=ü"], ["a=" + "b" * 300]],
)
def test_names_are_safe_in_a_path(overrides: list[str]) -> None:
    name = cell_name(overrides)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", name)
    assert len(name) <= LONGEST


def test_cells_that_differ_in_lost_characters_or_past_the_cut_stay_apart() -> None:
    assert cell_name(["x=a/b"]) != cell_name(["x=a b"])
    long = ["x=" + "a" * 200]
    assert cell_name([*long, "seed=1"]) != cell_name([*long, "seed=2"])


def test_a_run_is_named_by_what_can_change_its_result() -> None:
    assert run_name(None, []) == "default"
    assert run_name("mine", ["mask=causal"]) == "mine"
    name = run_name(None, ["mask=causal", "connector=mlp"])
    assert name == run_name(None, ["connector=mlp", "mask=causal"])
    assert name == run_name(
        None, ["connector=mlp", "fresh=true", "mask=causal", "trainer.save_every_s=0", "logger=wandb"]
    )
    assert name != run_name(None, ["connector=mlp", "mask=causal", "seed=1"])


def test_a_sweep_is_named_by_its_keys_so_that_it_grows() -> None:
    name = sweep_name(None, ["connector=mlp,qformer", "mask=bidir,causal", "budget=short"])
    assert name.startswith("budget-short_connector_mask-")
    more = ["connector=mlp,qformer,pool", "mask=choice(bidir,causal)", "budget=short", "seed=0,1,2"]
    assert sweep_name(None, more) == sweep_name(None, [*more[:3], "seed=5"]) == name
    assert sweep_name(None, ["connector=mlp,qformer", "mask=bidir", "budget=short"]) != name
    assert sweep_name(None, ["connector=mlp,qformer", "mask=bidir,causal", "budget=test"]) != name
    assert sweep_name("mine", more) == "mine"
    assert sweep_name(None, ["seed=0,1"]) == "default"


def test_a_key_that_only_begins_like_an_ignored_one_counts() -> None:
    assert run_name(None, ["names=1"]) != "default"
    assert run_name(None, ["trainer.workers=3"]) == "default"


def test_override_key() -> None:
    assert [override_key(o) for o in ("a.b=1", "+a=b=c", "++a=1", "~a")] == ["a.b", "a", "a", "a"]

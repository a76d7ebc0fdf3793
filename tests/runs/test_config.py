from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from vlmlab.contracts.errors import UserError
from vlmlab.runs.config import config_hash, differences, plain

BASE: dict[str, Any] = {
    "name": None,
    "fresh": False,
    "seed": 0,
    "trainer": {"threads": 1, "workers": 0, "save_every_s": 30},
    "recipe": {"stages": {"a": {"steps": 1}, "b": {"steps": 2}}},
    "logger": {"name": "jsonl"},
}


def changed(**keys: Any) -> dict[str, Any]:
    cfg = OmegaConf.create(BASE)
    for key, value in keys.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return plain(cfg)


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "x"},
        {"fresh": True},
        {"trainer__workers": 3},
        {"trainer__save_every_s": 0},
        {"logger": {"name": "wandb"}},
    ],
)
def test_what_cannot_change_the_result_does_not_change_the_hash(keys: dict[str, Any]) -> None:
    assert config_hash(changed(**keys)) == config_hash(BASE)


@pytest.mark.parametrize("keys", [{"seed": 1}, {"trainer__threads": 2}, {"recipe__stages__b__steps": 3}])
def test_what_can_change_the_result_changes_the_hash(keys: dict[str, Any]) -> None:
    assert config_hash(changed(**keys)) != config_hash(BASE)


def test_the_order_of_stages_counts_and_the_order_of_other_keys_does_not() -> None:
    stages = BASE["recipe"]["stages"]
    other = {**BASE, "recipe": {"stages": {name: stages[name] for name in ("b", "a")}}}
    assert config_hash(other) != config_hash(BASE)
    assert differences(BASE, other) == ['recipe.stages (order): ["a", "b"] -> ["b", "a"]']
    assert config_hash(dict(reversed(BASE.items()))) == config_hash(BASE)


def test_differences_name_keys_and_both_values() -> None:
    assert differences(BASE, changed(seed=3, trainer__workers=9)) == ["seed: 0 -> 3"]
    assert differences(BASE, {**BASE, "extra": {"x": None}}) == ["extra.x: (absent) -> null"]


def test_plain_resolves_and_names_what_is_missing() -> None:
    cfg = OmegaConf.create({"a": 1, "b": "${a}", "hydra": {"x": "???"}})
    assert plain(cfg) == {"a": 1, "b": 1}
    with pytest.raises(UserError, match=r"data\.path is needed"):
        plain(OmegaConf.create({"data": {"path": "???"}}))
    with pytest.raises(UserError, match=r"^x cannot be resolved"):
        plain(OmegaConf.create({"x": "${nothing}"}))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (
            {"recipe": {"stages": {"a": {"module": "vlmlab.recipe.alignment.AlignmentModule"}}}},
            "recipe.stages.a.module",
        ),
        ({"b": [1, {"c": "vlmlab.recipe.alignment.AlignmentModule"}]}, "b.1.c"),
    ],
)
def test_plain_says_how_a_class_that_has_moved_is_called_now(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        plain(OmegaConf.create(config))
    now = "vlmlab.engine.alignment.AlignmentModule"
    assert str(caught.value) == f"{key}=vlmlab.recipe.alignment.AlignmentModule is now {now}; write {key}={now}"


def test_numbers_survive_the_run_folder_unchanged() -> None:
    import yaml

    config = {"a": 1e-5, "b": 3e-4, "c": "1e-3", "d": float("inf"), "e": "no", "f": [1, None, True]}
    assert yaml.safe_load(yaml.safe_dump(config)) == config

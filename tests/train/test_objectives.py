"""What a stage calls its objectives: one, several by name, or a sentence about what is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fake_lab import config

from vlmlab.contracts.errors import UserError
from vlmlab.engine.weights import build_objectives
from vlmlab.recipe.stage import parse

LM = {"_target_": "vlmlab.objective.lm.LanguageModelling"}


def built(objective: Any) -> dict[str, Any]:
    return build_objectives(dataclasses.replace(parse(config())[0], objective=objective))


def test_one_or_several() -> None:
    assert list(built(LM)) == ["objective"]
    several = built({"text": LM | {"weight": 2.0}, "none": None})
    assert list(several) == ["text"] and several["text"].weight == 2.0


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({}, "objective is empty"),
        ({"text": None}, "objective is empty"),
        ({"text": "lm"}, "objective.text=lm is not an objective; give it _target_"),
        ({"weight": 1.0}, "objective.weight=1.0 is not an objective; give it _target_"),
        ({"text": {"weight": 1.0}}, "objective.text={'weight': 1.0} is not an objective; give it _target_"),
        ({"text": {"inner": LM}}, "objective.text={'inner': "),
        ({"text": [LM]}, "objective.text=[{'_target_'"),
        ({"text": {}}, "objective.text={} is not an objective"),
        ({"_target_": None}, "objective={'_target_': None} is not an objective"),
        (
            {"text": {"_target_": "builtins.dict"}},
            "objective.text._target_=builtins.dict is not an objective; it has",
        ),
    ],
)
def test_what_is_none_is_named(objective: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        built(objective)
    assert f"recipe.stages.{parse(config())[0].name}.{words}" in str(caught.value) and "\n" not in str(caught.value)

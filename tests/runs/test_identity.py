"""Which keys of a configuration make a training the one it is."""

from __future__ import annotations

from typing import Any

import pytest
from tests.test_conf import composed

from vlmlab.runs.config import LOOKS, config_hash, leaves, plain
from vlmlab.runs.identity import Changes, about, changes, training_hash
from vlmlab.runs.names import changes_result

VQA = ("data=vqa", "data.path=train.json", "data.images=img", "data.test_path=test.json")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return plain(composed(*VQA))


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {**config, head: changed(config.get(head) or {}, rest, value) if rest else value}


def of_group(config: dict[str, Any], *prefixes: str) -> list[str]:
    counted = (key for key, _ in leaves(config) if changes_result(key) and key not in LOOKS)
    return [key for key in counted if key.startswith(prefixes)]


def test_every_key_that_scores_is_about_the_evaluation(config: dict[str, Any]) -> None:
    keys = of_group(config, "evaluation.", "data.val.", "data.benchmarks.", "budget.eval_limit")
    keys.remove("evaluation.patience")
    assert len(keys) > 60 and {about(key) for key in keys} == {"evaluation"}
    for key in keys:
        other = changed(config, key, "other")
        found = changes(config, other)
        assert found.evaluation and found.scoring and not (found.training or found.execution or found.length), key
        assert training_hash(other) == training_hash(config), key


def test_every_key_that_is_learnt_from_is_about_the_training(config: dict[str, Any]) -> None:
    keys = of_group(
        config, "data.train.", "recipe.stages.", "encoder.", "connector.", "lm.", "mask.", "fusion.", "adapter.",
        "objective.", "seed", "precision.", "collate.", "budget.steps_scale", "budget.max_steps", "debug.steps",
        "data.max_bad_fraction", "trainer.gradient_clip",
    )  # fmt: skip
    assert len(keys) > 60
    for key in keys:
        if key != "collate.max_length" and not key.endswith(("test_path", "test_images")):
            other = changed(config, key, "other")
            assert changes(config, other).training and training_hash(other) != training_hash(config), key


def test_a_run_made_before_a_key_was_added_is_still_the_same(config: dict[str, Any]) -> None:
    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        later = ("init_from", "questions", "control_tokens", "image_range", "image_roots")
        return {key: without(item) for key, item in value.items() if key not in later}

    old = without(config)
    assert {"image_range", "control_tokens"} <= {key.rpartition(".")[2] for key, _ in leaves(config)}
    assert changes(old, config) == Changes() and training_hash(old) == training_hash(config)
    for key, value in (("collate.control_tokens", "text"), ("data.train.instruct.image_range", [0, 4095])):
        other = changed(config, key, value)
        assert changes(old, other).training and training_hash(old) != training_hash(other)


@pytest.mark.parametrize("key", ["accelerator", "devices", "strategy", "threads", "compile"])
def test_the_machine_is_apart(config: dict[str, Any], key: str) -> None:
    other = changed(config, f"trainer.{key}", "other")
    found = changes(config, other)
    assert found.execution and not (found.training or found.scoring)
    assert training_hash(other) == training_hash(config)


@pytest.mark.parametrize("key", ["name", "fresh", "logger.name", "trainer.workers", "trainer.progress", "cache.folder"])
def test_what_cannot_change_a_result_is_no_change(config: dict[str, Any], key: str) -> None:
    assert changes(config, changed(config, key, "other")) == changes(config, config)


@pytest.mark.parametrize(
    ("overrides", "training"),
    [
        (("data.test_path=other.json",), False),  # another test file
        (("data.test_path=null",), True),  # the test split is taken out of what was learnt
        (("data.path=other.json",), True),
        (("data.val_fraction=0.2",), True),
        (("data.suffix=Briefly.",), True),
        (("evaluation.batch_size=4", "budget.eval_limit=10"), False),
        (("data.screen=0",), False),
    ],
)
def test_what_a_command_changes(config: dict[str, Any], overrides: tuple[str, ...], training: bool) -> None:
    other = plain(composed(*VQA, *overrides))
    found = changes(config, other)
    assert bool(found.training) == training and found.scoring
    assert (training_hash(other) != training_hash(config)) == training


@pytest.mark.parametrize(("value", "kind"), [(2048, "length"), (512, "training"), (None, "training")])
def test_only_a_larger_length_keeps_the_training(config: dict[str, Any], value: Any, kind: str) -> None:
    found = changes(config, changed(config, "collate.max_length", value))
    assert [name for name in ("training", "length", "execution", "evaluation") if getattr(found, name)] == [kind]
    assert getattr(found, kind) == (f"collate.max_length: 1024 -> {'null' if value is None else value}",)


def test_a_key_of_scoring_that_was_not_there_yet_and_is_off_is_no_change(config: dict[str, Any]) -> None:
    assert changes(config, changed(config, "evaluation.new", None)) == changes(config, config)
    assert changes(config, changed(config, "evaluation.new", 3)).scoring
    assert changes(config, changed(config, "trainer.new", None)).training


def test_what_is_looked_at_while_training_changes_no_run_unless_it_decides(config: dict[str, Any]) -> None:
    """Not the training, nor the result; with ``load_best`` what is scored, with ``patience`` what is learnt."""
    best = changed(config, "evaluation.load_best", True)
    early = changed(config, "evaluation.patience", 3)
    assert training_hash(best) == training_hash(config) != training_hash(early)
    assert changes(config, best).evaluation and changes(config, early).training and changes(early, config).training
    for key in LOOKS:
        assert config_hash(changed(config, key, "other")) == config_hash(config), key
        scored, learnt = changes(best, changed(best, key, "other")), changes(early, changed(early, key, "other"))
        assert scored.evaluation and not scored.training and learnt.training, key
    assert changes(early, changed(early, "data.val.instruct", {"a": 1})).training
    assert not changes(early, changed(early, "budget.eval_limit", 3)).training

"""What of a configuration makes a training the one it is, and what only says how it is run or scored.

Weights stay what they are whatever is asked of them afterwards. So two configurations that differ in nothing but the
evaluation belong to the same training, and those that differ in the machine as well once that training is over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmlab.runs.config import LOOKS, difference, looks_decide, result_leaves

DATA = "data"
"""Group of the data; which one is chosen says what is learnt."""

EVALUATION = ("evaluation", "budget.eval_limit", DATA, "recipe.finish")
"""Keys that only say how a trained model is scored, but for those of `TRAINING`.

The keys right below ``data`` are written out where they are used: whatever of them training reads is in
``data.train`` too.
"""

TRAINING = ("data.train", "data.max_bad_fraction")
"""Keys below those of `EVALUATION` that say what is learnt, with all below them."""

DECIDING = (
    *LOOKS,
    *(f"evaluation.{key}" for key in ("patience", "every", "watched", "held_out_samples", "batch_size")),
    "data.val",
    "data.benchmarks",
)
"""Keys of the evaluation that say what is learnt where stages end early (``evaluation.patience``)."""

EXECUTION = tuple(f"trainer.{key}" for key in ("accelerator", "devices", "nodes", "strategy", "threads", "compile"))
"""Keys of the machine: they change a training by rounding alone, and one that is over not at all."""

TEST_SPLIT = ("test_path", "test_images")
"""Arguments of a reader that say where its test split is; for training it only counts whether one is given."""

LENGTH = "collate.max_length"
"""Longest sample: a larger one changes nothing of a training in which no sample was too long."""

NOT_OF_A_STAGE = ("adapter", "budget", "data.train", "debug", "init_from", "mask", "objective", "preset", "recipe")
"""What a stage has in its own resolved keys, begins with, or does not read; its own data aside."""


@dataclass(frozen=True)
class Changes:
    """How a configuration differs from that of a run, as ``key: old -> new``.

    Attributes:
        training: what makes it another training.
        length: the longest sample, made longer.
        execution: the machine.
        evaluation: the scoring alone.
    """

    training: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    execution: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    @property
    def scoring(self) -> bool:
        """Whether a trained model is scored otherwise."""
        return bool(self.evaluation or self.length)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """How two plain configurations differ, by what the differing keys are about."""
    looks = looks_decide(old) or looks_decide(new)
    before, after = result_leaves(old, looks), result_leaves(new, looks)
    early = ends_early(old) or ends_early(new)
    found: dict[str, list[str]] = {"training": [], "length": [], "execution": [], "evaluation": []}
    absent = "(absent)"
    for key in sorted({*before, *after}):
        was, now = before.get(key, absent), after.get(key, absent)
        unsaid = about(key, early) == "evaluation" and was in (absent, None) and now in (absent, None)
        if was != now and not unsaid:  # a key that was not there yet and is off
            found[_concern(key, was, now, early)].append(difference(key, was, now))
    return Changes(**{concern: tuple(texts) for concern, texts in found.items()})


def leaves_about(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The leaves of a configuration that are about this (see `about`), as the training is told them."""
    early = ends_early(config)
    return {key: told(key, value) for key, value in result_leaves(config).items() if about(key, early) == what}


def training_leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration tells the training, by its dotted keys; without `LENGTH`, which may grow."""
    return {key: value for key, value in leaves_about(config, "training").items() if key != LENGTH}


def stage_leaves(config: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Of what a configuration tells the training, what one stage reads beside its own keys.

    A key that is not listed counts: stages that are the same are then taken for two, which is the safe side.

    Args:
        config: the plain configuration.
        data: name of the stage's data.
    """
    own = (f"data.train.{data}",)
    leaves = training_leaves(config).items()
    return {key: value for key, value in leaves if _below(key, own) or not _below(key, NOT_OF_A_STAGE)}


def digest(value: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def training_hash(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal for two runs if and only if they are the same training."""
    return digest(training_leaves(config))


def weights_hash(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal for two runs exactly if nothing but their evaluation differs."""
    return digest([leaves_about(config, what) for what in ("training", "execution")])


def ends_early(config: Mapping[str, Any]) -> bool:
    """Whether stages end when validation has not improved for a while, so that its keys decide what is learnt."""
    keys = config.get("evaluation")
    return isinstance(keys, Mapping) and keys.get("patience") is not None


def about(key: str, early: bool = False) -> str:
    """``training``, ``execution`` or ``evaluation``: what a key of the configuration says something about.

    Args:
        key: its dotted name.
        early: whether the configuration has stages that end early.
    """
    if _below(key, EXECUTION):
        return "execution"
    if key == DATA or _below(key, TRAINING) or (early and _below(key, DECIDING)):
        return "training"
    return "evaluation" if _below(key, EVALUATION) else "training"


def _concern(key: str, was: Any, now: Any, early: bool) -> str:
    if key == LENGTH and isinstance(was, int) and isinstance(now, int) and now > was:
        return "length"
    return "evaluation" if told(key, was) == told(key, now) else about(key, early)


def told(key: str, value: Any) -> Any:
    """What training is told by the value of a key."""
    return value is not None if key.rpartition(".")[2] in TEST_SPLIT and _below(key, TRAINING) else value


def _below(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == one or key.startswith(one + ".") for one in keys)

"""How the weights of ``balance`` are found: by asking about training scenes and correcting what comes too often."""

from __future__ import annotations

from collections import Counter
from functools import cache

from vlmlab.data.world.balance import WEIGHTS, Key, targets
from vlmlab.data.world.questions import KINDS, Weights, dialogue
from vlmlab.data.world.scene import STANDARD, Scale, sample_scene
from vlmlab.data.world.stream import Stream

SCENES, ROUNDS = 500, 8
"""Of a fit while a source is used: every class comes within .03 of its share."""


@cache
def weights_of(scale: Scale) -> Weights:
    """The weights of a scale: the stored ones of the standard scale, others fitted, once a process, in seconds."""
    return WEIGHTS if scale == STANDARD else fit(SCENES, ROUNDS, scale)


def fit(scenes: int = 8000, rounds: int = 20, scale: Scale = STANDARD) -> dict[str, dict[Key, float]]:
    """Fit weights to ``targets`` on conversations about training scenes, by repeated proportional correction.

    Args:
        scenes: scenes per round; every round looks at new ones.
        rounds: corrections, each of half the remaining error in logarithms.
        scale: of the scenes.
    """
    wanted = targets(scale)
    weights = {kind: dict(classes) for kind, classes in wanted.items()}
    for step in range(rounds):
        found: Counter[tuple[str, Key]] = Counter()
        for index in range(scenes):
            scene = sample_scene("train", index + step * scenes, seed=1, scale=scale)
            for question in dialogue(scene, Stream(scene.id, "fit"), KINDS, weights):
                found[question.kind, (question.template, question.key)] += 1
        for kind, classes in weights.items():
            total = sum(found[kind, key] for key in classes)
            if not total:  # these scenes offer none of the kind
                continue
            for key in classes:
                classes[key] *= (wanted[kind][key] * total / max(found[kind, key], 1)) ** 0.5
            whole = sum(classes.values())
            weights[kind] = {key: value / whole for key, value in classes.items()}
    return weights

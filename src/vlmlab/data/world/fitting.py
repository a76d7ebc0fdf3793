"""How the weights of ``balance`` were found: by asking about training scenes and correcting what comes too often."""

from __future__ import annotations

from collections import Counter

from vlmlab.data.world.balance import TARGETS, Key
from vlmlab.data.world.questions import KINDS, dialogue
from vlmlab.data.world.scene import sample_scene
from vlmlab.data.world.stream import Stream


def fit(scenes: int = 8000, rounds: int = 20) -> dict[str, dict[Key, float]]:
    """Fit ``WEIGHTS`` to ``TARGETS`` on conversations about training scenes, by repeated proportional correction.

    Args:
        scenes: scenes per round; every round looks at new ones.
        rounds: corrections, each of half the remaining error in logarithms.
    """
    weights = {kind: dict(classes) for kind, classes in TARGETS.items()}
    for step in range(rounds):
        found: Counter[tuple[str, Key]] = Counter()
        for index in range(scenes):
            scene = sample_scene("train", index + step * scenes, seed=1)
            for question in dialogue(scene, Stream(scene.id, "fit"), KINDS, weights):
                found[question.kind, (question.template, question.key)] += 1
        for kind, classes in weights.items():
            total = sum(found[kind, key] for key in classes)
            for key in classes:
                classes[key] *= (TARGETS[kind][key] * total / max(found[kind, key], 1)) ** 0.5
            scale = sum(classes.values())
            weights[kind] = {key: value / scale for key, value in classes.items()}
    return weights

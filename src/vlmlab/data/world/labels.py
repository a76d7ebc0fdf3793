"""``WorldLabels``: scenes of a single object, and what it is: the classes of a zero-shot benchmark."""

from __future__ import annotations

from itertools import product
from typing import Literal

from vlmlab.contracts.sample import Sample, Turn
from vlmlab.contracts.values import Count, Seed
from vlmlab.data.world.render import render
from vlmlab.data.world.scene import COLORS, HELD_OUT, SHAPES, STANDARD, Scale, Split, check_split, sample_scene
from vlmlab.data.world.words import COLOR, SHAPE, phrase

ALONE = Scale(STANDARD.grid, 1, 1)
"""One object in a scene of the usual grid."""

Named = Literal["color", "shape", "color_and_shape"]


class WorldLabels:
    """One object, anywhere in the scene, with the name of its class.

    Args:
        split: train, val, test or compositional.
        size: number of samples.
        named: what a class is: "color", "shape", or both together.
        seed: another seed gives other scenes.

    Attributes:
        classes: the names of all classes; pairs that the split never shows are left out.

    Raises:
        UserError: for an unknown split.
    """

    def __init__(self, split: Split, size: Count, named: Named = "color_and_shape", seed: Seed = 0) -> None:
        check_split(split)
        self.split, self.size, self.seed, self.named = split, size, seed, named
        held = split == "compositional"
        shown = [
            pair
            for pair in product(range(COLORS), range(SHAPES))
            if named != "color_and_shape" or (pair in HELD_OUT) == held
        ]
        self.classes = list(dict.fromkeys(self._label(*pair) for pair in shown))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        scene = sample_scene(self.split, index, self.seed, "base", ALONE)
        label = self._label(*scene.objects[0].pair)
        turn = Turn("", label, self.named, chance=1 / len(self.classes))
        return Sample(f"{scene.id}/{self.named}", (render(scene),), (turn,), image_ids=(scene.id,))

    def _label(self, color: int, shape: int) -> str:
        words = {"color": COLOR, "shape": SHAPE, "color_and_shape": COLOR | SHAPE}[self.named]
        name = phrase("base", words, (color, shape, 0, 0))
        return name.split()[0] if self.named == "color" else name

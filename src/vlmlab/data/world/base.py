"""What all sources of the embedded world share: an address, a size, a scale, and samples before they are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypedDict, Unpack

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, Turn
from vlmlab.contracts.values import Count, Seed
from vlmlab.data.world.fitting import weights_of
from vlmlab.data.world.questions import View, dialogue
from vlmlab.data.world.render import render
from vlmlab.data.world.scene import (
    STANDARD,
    Grid,
    Objects,
    Scale,
    Scene,
    Split,
    check_split,
    sample_scene,
    scale_of,
    scene_id,
)
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import COLOR, SHAPE, Domain, lexicon, phrase

STRIDE = 1024
"""Scenes set aside for one question or one interleaved sample: they are tried in turn until one fits."""
_ORDINALS = ("first", "second", "third")


@dataclass(frozen=True, slots=True)
class Unrendered:
    """A sample before its scenes are drawn: what it says is known without a pixel."""

    id: str
    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    system: str = ""

    def sample(self) -> Sample:
        """The same with its images."""
        ids = tuple(scene.id for scene in self.scenes)
        return Sample(self.id, tuple(map(render, self.scenes)), self.turns, self.system, ids)


class WorldSource(ABC):
    """What all sources of the world share: an address and a size.

    Args:
        split: train, val, test or compositional.
        size: number of samples.
        seed: another seed gives other scenes.
        domain: base or shifted.

    Raises:
        UserError: for an unknown split or domain, or a size below 1.
    """

    def __init__(self, split: Split, size: Count, seed: Seed = 0, domain: Domain = "base") -> None:
        check_split(split)
        lexicon(domain)
        check_size(size)
        self.split = split
        self.size = size
        self.seed = seed
        self.domain = domain

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return self._within(index).sample()

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of a sample, without its images."""
        return self._within(index).turns

    def _within(self, index: int) -> Unrendered:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        return self._unrendered(index)

    @abstractmethod
    def _unrendered(self, index: int) -> Unrendered:
        """The sample of an index within the size."""

    @property
    def _scale(self) -> Scale:
        return STANDARD

    def _scene(self, index: int) -> Scene:
        return sample_scene(self.split, index, self.seed, self.domain, self._scale)

    def _stream(self, index: int, purpose: str) -> Stream:
        return Stream(scene_id(self.domain, self.split, index, self.seed, self._scale), self.seed, purpose)

    def _interleaved(self, index: int) -> Unrendered:
        """Two or three images in one prompt, and a question that needs all of them."""
        stream = self._stream(index, "interleaved")
        number = 2 + stream.below(2)
        scenes, terms = self._unequal(index, number, stream)
        words = lexicon(self.domain)
        question = stream.choice(words.templates[f"interleaved/{'two' if number == 2 else 'three'}"])
        place = stream.below(number)
        scenes = scenes[1 : place + 1] + scenes[:1] + scenes[place + 1 :]
        tags = " ".join(f"{name} {words.picture}: {IMAGE_TAG}" for name in _ORDINALS[:number])
        turn = Turn(f"{tags} {question.format(terms=terms)}", _ORDINALS[place], "interleaved", chance=1 / number)
        name = scene_id(self.domain, self.split, index, self.seed, self._scale)
        return Unrendered(f"{name}/interleaved", tuple(scenes), (turn,))

    def _unequal(self, index: int, number: int, stream: Stream) -> tuple[list[Scene], str]:
        """Scenes, the one with strictly the most first, and what is counted in them."""
        attempt = index * STRIDE
        while True:
            scenes = [self._scene(attempt + i) for i in range(number)]
            attempt += number
            views = [View(scene) for scene in scenes]
            mask = stream.choice((0, COLOR, SHAPE))
            term = stream.choice(stream.choice(views).attributes)
            counts = [view.matching(mask, term) for view in views]
            most = max(counts)
            if counts.count(most) == 1:
                best = counts.index(most)
                return [scenes[best], *scenes[:best], *scenes[best + 1 :]], phrase(self.domain, mask, term, plural=True)


class SceneKeys(TypedDict, total=False):
    """Keys that say which scenes a source has."""

    seed: Seed
    domain: Domain


class ScaledSceneKeys(SceneKeys, total=False):
    """The same, with their scale."""

    grid: Grid
    objects: Objects


class ScaledSource(WorldSource):
    """A source whose scenes may be of another scale than the shipped towers saw.

    Args:
        split, size, seed, domain: as for every source of the world.
        grid: rows, and columns, of the scene, 2 to 8; 16 pixels each.
        objects: (fewest, most) objects in a scene, at most 16.

    Raises:
        UserError: as for every source of the world, or a scale that cannot be.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        grid: Grid = STANDARD.grid,
        objects: Objects = (STANDARD.fewest, STANDARD.most),
        **address: Unpack[SceneKeys],
    ) -> None:
        super().__init__(split, size, **address)
        self.grid = grid
        self.objects = tuple(objects)
        self._drawn = scale_of(grid, self.objects)

    @property
    def drawn(self) -> ScaledSceneKeys:
        """The keys of these scenes, for another source of the same."""
        return {"seed": self.seed, "domain": self.domain, "grid": self.grid, "objects": self.objects}

    @property
    def _scale(self) -> Scale:
        return self._drawn

    def _dialogue(self, index: int, kinds: tuple[str, ...]) -> Unrendered:
        """A conversation about the index's scene, or about one set aside for it where that offers none of the kinds."""
        sample, attempt = dialogue_sample(self._scene(index), kinds), 0
        while not sample.turns:
            if attempt == STRIDE:
                raise UserError(
                    f"No scene with grid={self.grid} and objects={[*self.objects]} has a question of kind "
                    f"{' or '.join(kinds)}; give other kinds, or another range of objects."
                )
            sample, attempt = dialogue_sample(self._scene(index * STRIDE + attempt), kinds), attempt + 1
        return sample


def dialogue_sample(scene: Scene, kinds: tuple[str, ...]) -> Unrendered:
    """Six to eight questions about a scene; without turns where it offers none of the kinds."""
    stream = Stream(scene.id, scene.seed, "dialogue", *kinds)
    turns = tuple(question.turn() for question in dialogue(scene, stream, kinds, weights_of(scene.scale)))
    return Unrendered(f"{scene.id}/dialogue", (scene,), turns)


def check_size(size: int) -> None:
    """Refuse a source without samples; UserError."""
    if size < 1:
        raise UserError(f"The world cannot have {size} samples; set size to 1 or more.")


def check_share(key: str, value: float) -> None:
    """Refuse a share outside 0..1; UserError naming its key."""
    if not 0 <= value <= 1:
        raise UserError(f"{key} is a share and cannot be {value}; set it within 0 to 1.")

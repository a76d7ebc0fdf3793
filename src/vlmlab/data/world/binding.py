"""Fast binding: made-up names for what a few pictures show, and a new picture to be named (Frozen, arXiv 2106.13884).

Every sample has names of its own, so that nothing but the examples before the question says what they mean. With names
drawn at random for the examples nothing does, and chance is all that is left: the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Unpack, get_args

from annotated_types import Interval, MinLen

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, Turn
from vlmlab.contracts.values import Count, Share
from vlmlab.data.world.base import STRIDE, SceneKeys, Unrendered, WorldSource, check_share
from vlmlab.data.world.contrasts import with_value
from vlmlab.data.world.language import coined
from vlmlab.data.world.scene import COLORS, HELD_OUT, SHAPES, Scene, Split
from vlmlab.data.world.sources import InstructKeys, WorldInstruct
from vlmlab.data.world.stream import Stream

Labels = Literal["right", "shuffled"]
LABELS: tuple[Labels, ...] = get_args(Labels)
Bound = Literal["color", "shape"]
BOUND: tuple[Bound, ...] = get_args(Bound)
_VALUES = {"color": COLORS, "shape": SHAPES}
EXAMPLE, PROMPT = "This is {name}.", "What is this?"
Ways = Annotated[int, Interval(ge=2, le=6)]
Shots = Annotated[int, Interval(ge=1, le=8)]


class WorldBinding(WorldSource):
    """Pictures of one object each with their names between them, and one more that is to be named.

    Args:
        split, size, seed, domain: as for every source of the world.
        ways: names a sample, each for another value of one attribute.
        shots: pictures of each name before the question.
        by: what names may refer to, color or shape; null: either, drawn for each sample.
        labels: ``right``, or ``shuffled``: the examples' names drawn at random, so that there is nothing to learn from
            them.

    Raises:
        UserError: as for every source of the world, or numbers and words that cannot be.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        ways: Ways = 2,
        shots: Shots = 1,
        by: Annotated[Sequence[Bound], MinLen(1)] | None = None,
        labels: Labels = "right",
        **address: Unpack[SceneKeys],
    ) -> None:
        super().__init__(split, size, **address)
        if not 2 <= ways <= min(_VALUES.values()) or not 1 <= shots <= 8:
            raise UserError(f"ways={ways} and shots={shots} make no task; give 2 to 6 ways and 1 to 8 shots.")
        chosen = BOUND if by is None else tuple(by)
        if not chosen or not set(chosen) <= set(BOUND):
            raise UserError(f"Names cannot be bound by {[*chosen]}; set by to some of: {', '.join(BOUND)}.")
        if labels not in LABELS:
            raise UserError(f"labels={labels!r} is unknown; choose from {', '.join(LABELS)}.")
        self.ways, self.shots, self.by, self.labels = ways, shots, chosen, labels

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, image_ids=tuple(f"{sample.id}-{k}" for k in range(len(sample.images))))

    def _unrendered(self, index: int) -> Unrendered:
        stream = self._stream(index, f"binding/{self.ways}/{self.shots}")
        by = stream.choice(self.by)
        values = stream.shuffled(range(_VALUES[by]))[: self.ways]
        names = self._names(stream)
        shown = stream.shuffled([way for way in range(self.ways) for _ in range(self.shots)])
        asked = stream.below(self.ways)
        scenes = self._scenes(index, by, [values[way] for way in [*shown, asked]], stream)
        drawn = self._stream(index, "binding/labels")
        given = [names[way if self.labels == "right" else drawn.below(self.ways)] for way in shown]
        told = " ".join(f"{IMAGE_TAG} {EXAMPLE.format(name=name)}" for name in given)
        turn = Turn(f"{told} {IMAGE_TAG} {PROMPT}", names[asked], by, chance=1 / self.ways)
        name = f"{scenes[0].id}/binding/{index}"
        return Unrendered(name, tuple(scenes), (turn,))

    def _names(self, stream: Stream) -> list[str]:
        """Different made-up words."""
        names: dict[str, None] = {}
        while len(names) < self.ways:
            names[coined(stream)] = None
        return list(names)

    def _scenes(self, index: int, by: Bound, values: Sequence[int], stream: Stream) -> list[Scene]:
        """A scene of one object for each value of the attribute, no colour and shape that are held out."""
        found: list[Scene] = []
        attempt = index * STRIDE
        while len(found) < len(values):
            scene = self._scene(attempt)
            attempt += 1
            thing = with_value(stream.choice(scene.objects), by, values[len(found)])
            if thing.pair not in HELD_OUT:
                found.append(replace(scene, objects=(thing,)))
        return found


class WorldBindingInstruct(WorldInstruct):
    """Instruction tuning in which some samples are `WorldBinding`'s, interleaved pictures and names; others unchanged.

    Args:
        split, size, seed, domain: as for every source of the world.
        caption_fraction: share of caption samples among the others, half of them short, in 0..1.
        kinds: kinds of question asked there; all of them for None.
        binding_fraction: share of samples in which names are bound, in 0..1.
        ways, shots, by: as for `WorldBinding`.
        grid, objects: the others' scale.

    Raises:
        UserError: as for ``WorldInstruct`` and `WorldBinding`.
    """

    def __init__(
        self,
        split: Split,
        size: Count,
        binding_fraction: Share = 0.25,
        ways: Ways = 2,
        shots: Shots = 1,
        by: Annotated[Sequence[Bound], MinLen(1)] | None = None,
        **others: Unpack[InstructKeys],
    ) -> None:
        super().__init__(split, size, **others)
        check_share("binding_fraction", binding_fraction)
        self.binding_fraction = binding_fraction
        self.ways, self.shots = ways, shots
        self._episodes = WorldBinding(split, size, ways, shots, by, seed=self.seed, domain=self.domain)
        self.by = self._episodes.by

    def __getitem__(self, index: int) -> Sample:
        return self._episodes[index] if self._binds(index) else super().__getitem__(index)

    def _unrendered(self, index: int) -> Unrendered:
        return self._episodes._unrendered(index) if self._binds(index) else super()._unrendered(index)

    def _binds(self, index: int) -> bool:
        return self._stream(index, "instruct/binding").chance(self.binding_fraction)

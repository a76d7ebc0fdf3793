"""Scenes: which objects are where, drawn at random by split, index and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Interval, MaxLen, MinLen

from vlmlab.contracts.errors import UserError
from vlmlab.data.world.draw import CELL, GRID, bounds
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import lexicon

NAME = "world-v1"
Split = Literal["train", "val", "test", "compositional"]
SPLITS: tuple[Split, ...] = get_args(Split)
COLORS, SHAPES, SIZES, TEXTURES = 8, 6, 2, 2
LARGEST = 8
"""Most rows of a grid; more are not told apart at the size of an object."""
CROWD = 16
"""Most objects of a scene: numbers have words up to here."""

Grid = Annotated[int, Interval(ge=2, le=LARGEST)]
Objects = Annotated[Sequence[Annotated[int, Interval(ge=1, le=CROWD)]], MinLen(2), MaxLen(2)]

HELD_OUT = frozenset({(4, 0), (6, 1), (0, 2), (1, 3), (3, 4), (2, 5)})
"""Pairs (colour, shape) that no scene of train, val or test contains; every compositional scene contains one.

purple circle, cyan square, red triangle, green diamond, yellow cross, blue ring (and their counterparts, shifted).
"""

_POOL_SIZES = ((1, 2, 3, 5), (0.2, 0.3, 0.3, 0.2))
_UNIFORM_CHANCE = 0.3
"""How often all objects of a scene share their size; likewise their texture."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a scene is and how much is in it; fewer objects and rows are easier to tell apart.

    Attributes:
        grid: rows, and columns; a cell has 16 pixels a side.
        fewest, most: objects, every number equally likely.
    """

    grid: int = GRID
    fewest: int = 1
    most: int = 5

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""
        return self.grid * CELL

    @property
    def name(self) -> str:
        """What a scene's name says of it; nothing of the standard scale."""
        return "" if self == STANDARD else f"-{self.grid}x{self.grid}-{self.fewest}to{self.most}"


STANDARD = Scale()
"""What the shipped towers saw, and what a source without ``grid`` and ``objects`` draws."""


def scale_of(grid: int, objects: Sequence[int]) -> Scale:
    """The scale of two keys.

    Raises:
        UserError: a grid outside 2 to 8, or numbers of objects that it does not hold.
    """
    if not 2 <= grid <= LARGEST:
        raise UserError(f"The world has no grid of {grid} rows; set grid within 2 to {LARGEST}.")
    room = min(grid * grid, CROWD)
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= room or objects[1] < 2:
        raise UserError(
            f"objects={[*objects]} is not a range of numbers of objects; give [fewest, most] with 1 <= fewest <= most "
            f"and 2 <= most <= {room}, what a grid of {grid} rows holds."
        )
    return Scale(grid, objects[0], objects[1])


@dataclass(frozen=True, slots=True)
class Object:
    """One object.

    Attributes:
        color, shape, size, texture: indices into the domain's ``Lexicon``; size 0 is large, texture 0 the first.
        row, col: the cell, counted from 0 at the top left.
        origin: pixel (x, y) of the patch's top left corner, jitter included.
        box: ``(x0, y0, x1, y1)`` in pixels, upper ends exclusive; exactly the pixels the object touches.
    """

    color: int
    shape: int
    size: int
    texture: int
    row: int
    col: int
    origin: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def pair(self) -> tuple[int, int]:
        """(colour, shape): what the compositional split holds out."""
        return self.color, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene; ``objects`` are in raster order.

    Attributes:
        domain, split, index, seed: its address.
        objects: at most one per cell.
        background: mean grey level, 0..255.
        scale: grid and number of objects that it was drawn for.
    """

    domain: str
    split: str
    index: int
    seed: int
    objects: tuple[Object, ...]
    background: int
    scale: Scale = STANDARD

    @property
    def id(self) -> str:
        """A stable name, for example ``world-v1/test/17``."""
        return scene_id(self.domain, self.split, self.index, self.seed, self.scale)


def scene_id(domain: str, split: str, index: int, seed: int, scale: Scale = STANDARD) -> str:
    """The name of a scene; domain, scale and seed appear where they are not the default."""
    name = (NAME if domain == "base" else f"{NAME}-{domain}") + scale.name
    return f"{name}/{split}/{index}" if seed == 0 else f"{name}.{seed}/{split}/{index}"


def check_split(split: str) -> None:
    """Refuse an unknown split.

    Raises:
        UserError: naming the splits there are.
    """
    if split not in SPLITS:
        raise UserError(f"The world has no split {split!r}; set split to one of: {', '.join(SPLITS)}.")


def _pool(stream: Stream, kinds: int) -> list[int]:
    """A few of the values 0 .. kinds - 1: few values make repetitions, and so counts and comparisons, common."""
    sizes, weights = _POOL_SIZES
    return stream.shuffled(range(kinds))[: sizes[stream.weighted(weights)]]


def _binary(stream: Stream, count: int) -> list[int]:
    """Sizes or textures of all objects: sometimes all the same, else independent."""
    if stream.chance(_UNIFORM_CHANCE):
        return [stream.below(2)] * count
    return [stream.below(2) for _ in range(count)]


def _allowed_pair(stream: Stream, colors: list[int], shapes: list[int]) -> tuple[int, int]:
    """A pair from the pools that is not held out; where they offer none, the colour leaves its pool."""
    pairs = [(color, shape) for color in colors for shape in shapes if (color, shape) not in HELD_OUT]
    if not pairs:
        pairs = [(color, shape) for color in range(COLORS) for shape in shapes if (color, shape) not in HELD_OUT]
    return stream.choice(pairs)


def _pairs(stream: Stream, split: str, count: int) -> list[tuple[int, int]]:
    colors, shapes = _pool(stream, COLORS), _pool(stream, SHAPES)
    if split != "compositional":
        return [_allowed_pair(stream, colors, shapes) for _ in range(count)]
    held = stream.choice(sorted(HELD_OUT))
    colors[0], shapes[0] = held
    pairs = [(stream.choice(colors), stream.choice(shapes)) for _ in range(count)]
    pairs[stream.below(count)] = held
    return pairs


def sample_scene(split: str, index: int, seed: int = 0, domain: str = "base", scale: Scale = STANDARD) -> Scene:
    """The scene at an address; the same for the same address, whatever was asked before.

    Raises:
        UserError: for an unknown split or domain.
    """
    check_split(split)
    low, high = lexicon(domain).background
    stream = Stream(scene_id(domain, split, index, seed, scale), seed, "scene")
    count = scale.fewest + stream.below(scale.most - scale.fewest + 1)
    pairs = _pairs(stream, split, count)
    sizes, textures = _binary(stream, count), _binary(stream, count)
    cells = sorted(_cells(stream, count, scale.grid))
    objects = []
    for (color, shape), size, texture, cell in zip(pairs, sizes, textures, cells, strict=True):
        row, col = divmod(cell, scale.grid)
        left, top = col * CELL + stream.below(3), row * CELL + stream.below(3)
        x0, y0, x1, y1 = bounds(shape, size)
        box = (left + x0, top + y0, left + x1, top + y1)
        objects.append(Object(color, shape, size, texture, row, col, (left, top), box))
    return Scene(domain, split, index, seed, tuple(objects), low + stream.below(high - low + 1), scale)


def _cells(stream: Stream, count: int, grid: int) -> set[int]:
    """Distinct cells, each set equally likely."""
    cells: set[int] = set()
    while len(cells) < count:
        cells.add(stream.below(grid * grid))
    return cells

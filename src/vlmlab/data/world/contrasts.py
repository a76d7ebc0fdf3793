"""Scenes that differ from one another in one thing: hard negatives for an image-text contrast.

Captions of unrelated scenes are told apart by a count and a colour; only among scenes that are nearly the same does a
caption's every word matter, and which object each word belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vlmlab.data.world.draw import CELL, GRID, bounds
from vlmlab.data.world.scene import COLORS, HELD_OUT, SHAPES, SIZES, TEXTURES, Object, Scene
from vlmlab.data.world.stream import Stream

_KINDS = (COLORS, SHAPES, SIZES, TEXTURES)
_FIELDS = ("color", "shape", "size", "texture")
_TRIES = 32


def contrasts(scene: Scene, count: int, stream: Stream) -> list[Scene]:
    """The scene and ``count - 1`` others, each with one thing changed, no two of them alike in what they contain.

    A change gives an object another value of one attribute or another cell, exchanges the values of an attribute or
    the cells of two objects, or takes an object away. No change makes a colour and shape meet that are held out.

    Raises:
        RuntimeError: so many different ones were not found.
    """
    found = [scene]
    told = {_content(scene.objects)}
    for _ in range(_TRIES * count):
        if len(found) == count:
            return found
        changed = stream.choice(_CHANGES)(list(scene.objects), stream)
        content = _content(changed)
        if not changed or content in told or any(thing.pair in HELD_OUT for thing in changed):
            continue
        told.add(content)
        ordered = tuple(sorted(changed, key=lambda thing: (thing.row, thing.col)))
        found.append(replace(scene, objects=ordered))
    if len(found) == count:
        return found
    raise RuntimeError(f"{scene.id} has no {count} contrasts")


def _content(objects: list[Object] | tuple[Object, ...]) -> frozenset[tuple[int, ...]]:
    """What a caption can tell of a scene; pixels of jitter are not in it."""
    return frozenset((thing.row, thing.col, thing.color, thing.shape, thing.size, thing.texture) for thing in objects)


def _placed(thing: Object, row: int, col: int) -> Object:
    """The object in a cell, with the jitter that it has, and its box anew."""
    x, y = thing.origin
    left, top = x + (col - thing.col) * CELL, y + (row - thing.row) * CELL
    x0, y0, x1, y1 = bounds(thing.shape, thing.size)
    box = (left + x0, top + y0, left + x1, top + y1)
    return replace(thing, row=row, col=col, origin=(left, top), box=box)


def with_value(thing: Object, field: str, value: int) -> Object:
    """The object with another color, shape, size or texture, and its box anew."""
    changes: dict[str, Any] = {field: value}
    return _placed(replace(thing, **changes), thing.row, thing.col)


def _alter(objects: list[Object], stream: Stream) -> list[Object]:
    """One attribute of one object gets another value."""
    at, position = stream.below(len(objects)), stream.below(len(_FIELDS))
    now = getattr(objects[at], _FIELDS[position])
    value = (now + 1 + stream.below(_KINDS[position] - 1)) % _KINDS[position]
    return [*objects[:at], with_value(objects[at], _FIELDS[position], value), *objects[at + 1 :]]


def _move(objects: list[Object], stream: Stream) -> list[Object]:
    """One object goes to a free cell."""
    at = stream.below(len(objects))
    taken = {(thing.row, thing.col) for thing in objects}
    cell = stream.choice([place for place in map(lambda i: divmod(i, GRID), range(GRID * GRID)) if place not in taken])
    return [*objects[:at], _placed(objects[at], *cell), *objects[at + 1 :]]


def _exchange(objects: list[Object], stream: Stream) -> list[Object]:
    """Two objects exchange their values of one attribute; nothing where there is but one object."""
    if len(objects) < 2:
        return []
    a, b = stream.shuffled(range(len(objects)))[:2]
    field = _FIELDS[stream.below(len(_FIELDS))]
    first, second = (getattr(objects[i], field) for i in (a, b))
    out = list(objects)
    out[a], out[b] = with_value(objects[a], field, second), with_value(objects[b], field, first)
    return out


def _trade(objects: list[Object], stream: Stream) -> list[Object]:
    """Two objects exchange their cells; nothing where there is but one object."""
    if len(objects) < 2:
        return []
    a, b = stream.shuffled(range(len(objects)))[:2]
    out = list(objects)
    out[a] = _placed(objects[a], objects[b].row, objects[b].col)
    out[b] = _placed(objects[b], objects[a].row, objects[a].col)
    return out


def _drop(objects: list[Object], stream: Stream) -> list[Object]:
    """One object less; nothing where that would leave none."""
    at = stream.below(len(objects))
    return [*objects[:at], *objects[at + 1 :]]


_CHANGES: tuple[Callable[[list[Object], Stream], list[Object]], ...] = (_alter, _move, _exchange, _trade, _drop)

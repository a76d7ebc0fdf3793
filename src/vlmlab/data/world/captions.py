"""Captions in two styles: five short, uneven, human-like references, and one dense, consistent re-caption."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vlmlab.data.world.loose import LooseScene, covering
from vlmlab.data.world.scene import STANDARD, Object, Scene
from vlmlab.data.world.stream import Stream
from vlmlab.data.world.words import COLOR, NUMBERS, SHAPE, SIZE, TEXTURE, Lexicon, lexicon, phrase, with_article

REFERENCES = 5
_EMPTY = "empty empty empty empty"
_PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
_SIZE_NAMED = (0.45, 0.3)
"""How often people name the size of a (large, small) object; likewise its texture below."""
_TEXTURE_NAMED = (0.1, 0.35)


def attributes(thing: Object) -> tuple[int, int, int, int]:
    """(color, shape, size, texture) as indices."""
    return thing.color, thing.shape, thing.size, thing.texture


def joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def full_phrase(scene: Scene, thing: Object) -> str:
    """Size, colour, texture and shape, without an article."""
    return phrase(scene.domain, COLOR | SHAPE | SIZE | TEXTURE, attributes(thing))


def cell_words(thing: Object) -> str:
    """The cell in words, ``row one column two``."""
    return f"row {NUMBERS[thing.row + 1]} column {NUMBERS[thing.col + 1]}"


def cells_caption(scene: Scene) -> str:
    """The cells in raster order, four words each: size, colour, texture and shape, or four times ``empty``."""
    inside = {(thing.row, thing.col): full_phrase(scene, thing) for thing in scene.objects}
    return "".join(f" {inside.get(divmod(place, scene.scale.grid), _EMPTY)}" for place in range(scene.scale.grid**2))


def placed_cells_caption(scene: Scene) -> str:
    """``cells_caption`` with the cell's own name before its four words: ``onetwo large red striped ring``."""
    return _placed_cells(cells_caption(scene).split(), scene.scale.grid)


def _placed_cells(words: Sequence[str], grid: int) -> str:
    """The names of the cells, each with its four words."""
    return "".join(f" {' '.join([name, *words[4 * i : 4 * i + 4]])}" for i, name in enumerate(placed_names(grid)))


def loose_caption(scene: LooseScene) -> str:
    """The same for a loose scene: each cell names the shape that covers most of it."""
    known = COLOR | SHAPE | SIZE | TEXTURE
    told = [_EMPTY if kind is None else phrase("base", known, kind) for kind in covering(scene)]
    return _placed_cells(" ".join(told).split(), STANDARD.grid)


def compound_caption(scene: Scene) -> str:
    """The cells in raster order, one word each: ``largeredstripedring`` or ``empty``, each after a blank."""
    inside = {(thing.row, thing.col): full_phrase(scene, thing).replace(" ", "") for thing in scene.objects}
    return "".join(f" {inside.get(divmod(place, scene.scale.grid), 'empty')}" for place in range(scene.scale.grid**2))


def placed_caption(scene: Scene) -> str:
    """Two words an object in raster order, its cell and itself: ``onetwo largeredstripedring``."""
    placed = sorted(scene.objects, key=lambda thing: (thing.row, thing.col))
    names = placed_names(scene.scale.grid)
    return "".join(
        f" {names[thing.row * scene.scale.grid + thing.col]} {full_phrase(scene, thing).replace(' ', '')}"
        for thing in placed
    )


def fused_caption(scene: Scene) -> str:
    """The cells in raster order, place and content in one fused word: ``onetwo+largeredstripedring``."""
    names = placed_names(scene.scale.grid)
    inside = {(thing.row, thing.col): full_phrase(scene, thing).replace(" ", "") for thing in scene.objects}
    return "".join(
        f" {name}+{inside.get(divmod(place, scene.scale.grid), 'empty')}" for place, name in enumerate(names)
    )


def placed_names(grid: int = STANDARD.grid) -> list[str]:
    """The names of the cells in raster order: ``onetwo`` is row one, column two."""
    return [NUMBERS[row + 1] + NUMBERS[column + 1] for row in range(grid) for column in range(grid)]


def fused_words(domain: str = "base") -> list[str]:
    """Every word that ``fused_caption`` can write."""
    words = lexicon(domain)
    kinds = itertools.product(words.sizes, words.colors, words.textures, words.shapes)
    contents = ["empty", *("".join(kind) for kind in kinds)]
    return [f"{name}+{content}" for name in placed_names() for content in contents]


def dense_caption(scene: Scene) -> str:
    """The number of objects, then every object in raster order with all its attributes and its cell."""
    words, count = lexicon(scene.domain), len(scene.objects)
    listed = [f"{with_article(full_phrase(scene, thing))} in {cell_words(thing)}" for thing in scene.objects]
    return f"{NUMBERS[count]} {words.noun if count == 1 else words.nouns}: {', '.join(listed)}."


@dataclass(frozen=True, slots=True)
class _Group:
    """Objects of one colour and shape, which people name together; `last` is the last row and column of their grid."""

    members: tuple[Object, ...]
    last: int

    @property
    def salience(self) -> int:
        """Large objects and many objects catch the eye."""
        return sum(3 if thing.size == 0 else 1 for thing in self.members)


def _groups(scene: Scene, stream: Stream) -> list[_Group]:
    """Groups, the most salient first; ties in one random order for all five people."""
    found: dict[tuple[int, int], list[Object]] = {}
    for thing in scene.objects:
        found.setdefault(thing.pair, []).append(thing)
    groups = stream.shuffled([_Group(tuple(members), scene.scale.grid - 1) for members in found.values()])
    return sorted(groups, key=lambda group: -group.salience)


def _adjectives(words: Lexicon, group: _Group, stream: Stream) -> list[str]:
    """Size, colour and texture words as a person might choose them; size and texture only where all agree."""
    first = group.members[0]
    out = [words.colors[first.color]]
    agree = len({thing.size for thing in group.members}) == 1
    if agree and stream.chance(_SIZE_NAMED[first.size]):
        out.insert(0, stream.choice((words.sizes, words.synonyms))[first.size])
    if len({thing.texture for thing in group.members}) == 1 and stream.chance(_TEXTURE_NAMED[first.texture]):
        out.append(words.textures[first.texture])
    return out


def _name(words: Lexicon, group: _Group, stream: Stream, article: str = "") -> str:
    """``a big red circle``, ``two red circles``, ``some red circles``; ``the`` where an article is given."""
    adjectives, count, first = _adjectives(words, group, stream), len(group.members), group.members[0]
    if count == 1:
        named = " ".join([*adjectives, words.shapes[first.shape]])
        return f"{article} {named}" if article else with_article(named)
    number = "some" if stream.chance(0.15) else NUMBERS[count]
    return " ".join([article or number, *adjectives, words.plurals[first.shape]])


def _place(thing: Object, last: int, stream: Stream) -> str:
    """Roughly where an object is; `last` is the last row and column."""
    left, right, top, bottom, middle = _PLACES
    fitting = [
        place
        for place, holds in (
            (left, thing.col == 0),
            (right, thing.col == last),
            (top, thing.row == 0),
            (bottom, thing.row == last),
        )
        if holds
    ]
    return stream.choice(fitting) if fitting else middle


def _list(words: Lexicon, groups: list[_Group], stream: Stream) -> str:
    most = 2 + stream.below(2)
    return joined([_name(words, group, stream) for group in groups[:most]])


def _counted(words: Lexicon, groups: list[_Group], stream: Stream) -> str:
    count = sum(len(group.members) for group in groups)
    if len(groups) == 1:
        named = _name(words, groups[0], stream)
        return stream.choice((f"there {'is' if count == 1 else 'are'} {named}", f"a {words.picture} of {named}"))
    named = joined([_name(words, group, stream) for group in groups[:2]])
    return stream.choice((f"{NUMBERS[count]} {words.nouns} with {named}", f"a {words.picture} of {named}"))


def _placed(words: Lexicon, groups: list[_Group], stream: Stream) -> str:
    names = [
        f"{_name(words, group, stream)} {_place(group.members[0], group.last, stream)}"
        if len(group.members) == 1 and (position == 0 or stream.chance(0.4))
        else _name(words, group, stream)
        for position, group in enumerate(groups[:2])
    ]
    return joined(names)


def _related(words: Lexicon, groups: list[_Group], stream: Stream) -> str:
    if len(groups) < 2 or len(groups[0].members) > 1 or len(groups[1].members) > 1:
        return _list(words, groups, stream)
    a, b = groups[0].members[0], groups[1].members[0]
    dx, dy = a.col - b.col, a.row - b.row
    if abs(dx) == abs(dy):
        return _list(words, groups, stream)
    sideways = "to the left of" if dx < 0 else "to the right of"
    where = sideways if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
    if stream.chance(0.3):
        return f"{_name(words, groups[0], stream, 'the')} is {where} {_name(words, groups[1], stream, 'the')}"
    return f"{_name(words, groups[0], stream)} {where} {_name(words, groups[1], stream)}"


_STYLES = (_list, _list, _counted, _placed, _related)


def short_captions(scene: Scene) -> tuple[str, ...]:
    """Five references by five people: different length, order, words and choice of objects, all of them true."""
    stream = Stream(scene.id, scene.seed, "short")
    words, groups = lexicon(scene.domain), _groups(scene, stream)
    out = []
    for style in stream.shuffled(_STYLES):
        seen = [*groups[1::-1], *groups[2:]] if len(groups) > 1 and stream.chance(0.25) else groups
        out.append(style(words, seen, stream) + ".")
    return tuple(out)

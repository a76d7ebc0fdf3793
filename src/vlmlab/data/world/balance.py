"""How often every class of question is asked, so that the question alone does not tell the answer.

``targets`` are the shares wanted within a kind; weights the factors by which a scene chooses among the classes it
offers, fitted by ``fitting.fit`` so that training samples reach those shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache

from vlmlab.data.world.scene import STANDARD, Scale

Key = tuple[str, str]

_COUNTED = 5
"""Largest number that questions about some of the objects are answered with; larger ones are rare in any scene."""
_PAIRS = 3
"""The same of objects that share colour and shape."""


@cache
def answers(scale: Scale) -> Mapping[str, Mapping[str, int]]:
    """Number of equally frequent answers per template; without templates that have but one."""
    counted = min(scale.most, _COUNTED) + 1
    everything = {"all": scale.most - scale.fewest + 1} if scale.most > scale.fewest else {}
    properties = dict.fromkeys(("color", "shape", "size", "texture"), counted)
    return {
        "attribute": {"color": 8, "shape": 6, "size": 2, "texture": 2},
        "existence": dict.fromkeys(("shape", "color", "pair", "size_shape", "texture_shape", "size_pair"), 2),
        "count": {**everything, **properties, "pair": min(scale.most, _PAIRS) + 1},
        "relation": {"relation": 4},
        "comparison": {"color": 3, "shape": 3, "size": 3, "texture": 3},
        "position": {"row": scale.grid, "column": scale.grid},
        "two_hop": {"color": 8, "shape": 6, "size": 2, "texture": 2},
    }


@cache
def chance(scale: Scale) -> Mapping[str, Mapping[str, float]]:
    """Stated chance per template: accuracy in 0..1 of the best answer that does not look.

    One over the number of answers, but for colour and shape: anyone who reads the shape (colour) in the question knows
    that the colour (shape) it is never paired with in training cannot be the answer.
    """
    known = {("attribute", "color"): 1 / 7, ("attribute", "shape"): 1 / 5}
    return {
        kind: {template: known.get((kind, template), 1 / number) for template, number in templates.items()}
        for kind, templates in answers(scale).items()
    }


_SHARES: Mapping[str, Mapping[str, float]] = {
    "attribute": {"color": 0.3, "shape": 0.3, "size": 0.2, "texture": 0.2},
    "existence": {
        "shape": 0.15,
        "color": 0.15,
        "pair": 0.3,
        "size_shape": 0.15,
        "texture_shape": 0.15,
        "size_pair": 0.1,
    },
    "count": {"all": 0.2, "color": 0.2, "shape": 0.2, "size": 0.1, "texture": 0.1, "pair": 0.2},
    "relation": {"relation": 1.0},
    "comparison": {"color": 0.35, "shape": 0.35, "size": 0.15, "texture": 0.15},
    "position": {"row": 0.5, "column": 0.5},
    "two_hop": {"color": 0.35, "shape": 0.35, "size": 0.15, "texture": 0.15},
}
_MENTIONED = 0.3
"""Share of two-hop questions on colour or shape whose reference names a value of the asked attribute."""


def _keys(kind: str, template: str, number: int, scale: Scale) -> dict[str, float]:
    """The keys of a template with that number of answers, and their shares within it."""
    if kind == "existence":
        return {"yes": 0.5, "no": 0.5}
    if kind == "comparison":
        return dict.fromkeys(("first", "second", "equal"), 1 / 3)
    if kind == "relation":
        return dict.fromkeys(("left", "right", "above", "below"), 0.25)
    if kind == "two_hop":
        if number == 2:
            return {"plain": 1.0}
        other = _MENTIONED * (number - 1) / number
        return {"plain": 1 - _MENTIONED, "same": _MENTIONED / number, "other": other}
    first = scale.fewest if (kind, template) == ("count", "all") else 0
    return {str(value): 1 / number for value in range(first, first + number)}


@cache
def targets(scale: Scale) -> Mapping[str, Mapping[Key, float]]:
    """The share of every class within its kind."""
    found: dict[str, dict[Key, float]] = {}
    for kind, templates in answers(scale).items():
        whole = sum(_SHARES[kind][template] for template in templates)
        found[kind] = {
            (template, key): _SHARES[kind][template] / whole * share
            for template, number in templates.items()
            for key, share in _keys(kind, template, number, scale).items()
        }
    return found


_EXISTENCE = (1.5, 1.5, 3.0, 1.5, 1.5, 1.0)
_FITTED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "attribute": {"color": (1.5,) * 8, "shape": (1.5,) * 6, "size": (1.0,) * 2, "texture": (1.0,) * 2},
    "existence": {name: (w, w) for name, w in zip(answers(STANDARD)["existence"], _EXISTENCE, strict=True)},
    "count": {
        "all": (3.46, 7.62, 25.5, 52.2, 152.0),
        "color": (1.6, 2.11, 8.16, 51.5, 225.0, 1470.0),
        "shape": (1.6, 2.11, 8.16, 51.5, 225.0, 1470.0),
        "size": (1.0, 1.14, 3.55, 14.0, 51.3, 206.0),
        "texture": (1.0, 1.14, 3.55, 14.0, 51.3, 206.0),
        "pair": (2.47, 2.69, 20.1, 404.0),
    },
    "relation": {"relation": (1.0,) * 4},
    "comparison": {
        "color": (2.5, 2.5, 32.8),
        "shape": (2.5, 2.5, 32.8),
        "size": (1.0, 1.0, 41.4),
        "texture": (1.0, 1.0, 41.4),
    },
    "position": {"row": (1.0,) * 4, "column": (1.0,) * 4},
    "two_hop": {"color": (13.6, 1.0, 7.23), "shape": (13.6, 1.27, 6.93), "size": (7.81,), "texture": (7.81,)},
}
"""What ``fitting`` found, in the order of a template's keys; classes that a symmetry of the world swaps share one."""

WEIGHTS: Mapping[str, Mapping[Key, float]] = {
    kind: dict(zip(classes, itertools.chain.from_iterable(_FITTED[kind].values()), strict=True))
    for kind, classes in targets(STANDARD).items()
}
"""The weights of the standard scale; those of others are fitted when they are asked for."""

"""How often every class of question is asked, so that the question alone does not tell the answer.

``TARGETS`` are the shares wanted within a kind; ``WEIGHTS`` the factors by which a scene chooses among the classes it
offers, fitted once by ``fitting.fit`` so that training samples reach those shares.
"""

from __future__ import annotations

from collections.abc import Mapping

Key = tuple[str, str]

ANSWERS: Mapping[str, Mapping[str, int]] = {
    "attribute": {"color": 8, "shape": 6, "size": 2, "texture": 2},
    "existence": dict.fromkeys(("shape", "color", "pair", "size_shape", "texture_shape", "size_pair"), 2),
    "count": {"all": 5, "color": 6, "shape": 6, "size": 6, "texture": 6, "pair": 4},
    "relation": {"relation": 4},
    "comparison": {"color": 3, "shape": 3, "size": 3, "texture": 3},
    "position": {"row": 4, "column": 4},
    "two_hop": {"color": 8, "shape": 6, "size": 2, "texture": 2},
}
"""Number of equally frequent answers per template."""

CHANCE: Mapping[str, Mapping[str, float]] = {
    kind: {
        template: {("attribute", "color"): 1 / 7, ("attribute", "shape"): 1 / 5}.get((kind, template), 1 / answers)
        for template, answers in templates.items()
    }
    for kind, templates in ANSWERS.items()
}
"""Stated chance per template: accuracy in 0..1 of the best answer that does not look.

One over the number of answers, but for colour and shape: whoever reads the shape (colour) in the question knows that
the colour (shape) it is never paired with in training cannot be the answer.
"""

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


def _keys(kind: str, template: str, answers: int) -> dict[str, float]:
    """The keys of a template and their shares within it."""
    if kind == "existence":
        return {"yes": 0.5, "no": 0.5}
    if kind == "comparison":
        return dict.fromkeys(("first", "second", "equal"), 1 / 3)
    if kind == "relation":
        return dict.fromkeys(("left", "right", "above", "below"), 0.25)
    if kind == "two_hop":
        if answers == 2:
            return {"plain": 1.0}
        other = _MENTIONED * (answers - 1) / answers
        return {"plain": 1 - _MENTIONED, "same": _MENTIONED / answers, "other": other}
    first = 1 if (kind, template) == ("count", "all") else 0
    return {str(value): 1 / answers for value in range(first, first + answers)}


TARGETS: Mapping[str, Mapping[Key, float]] = {
    kind: {
        (template, key): _SHARES[kind][template] * share
        for template, answers in templates.items()
        for key, share in _keys(kind, template, answers).items()
    }
    for kind, templates in ANSWERS.items()
}

_EXISTENCE = (1.5, 1.5, 3.0, 1.5, 1.5, 1.0)
_FITTED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "attribute": {"color": (1.5,) * 8, "shape": (1.5,) * 6, "size": (1.0,) * 2, "texture": (1.0,) * 2},
    "existence": {name: (w, w) for name, w in zip(ANSWERS["existence"], _EXISTENCE, strict=True)},
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
    kind: {
        (template, key): weight
        for template, answers in templates.items()
        for key, weight in zip(_keys(kind, template, answers), _FITTED[kind][template], strict=True)
    }
    for kind, templates in ANSWERS.items()
}

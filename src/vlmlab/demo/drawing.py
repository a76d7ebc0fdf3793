"""The parts of the demo's page as HTML; every text is escaped by the template engine, and nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image as Pillow

from vlmlab.analyse.report import SHOWN_SIDE, png_base64
from vlmlab.contracts.sample import Image
from vlmlab.demo.answers import Card
from vlmlab.demo.runs import Shown, rows
from vlmlab.evaluate.attention import CROSS, SELF, Attention

COLOURS = "plasma"
GREY = 90.0
"""The grey that the legend's colours are over."""

MEAN = "mean over all"
DENSEST = 0.85
"""Opacity of the map where the weight is largest; it is 0 where the weight is."""

PREVIEW = 512
"""Pixels of the longer side of a picture as it is shown."""

BARS = (36, 318, 8, 78)
"""Left, right, top and bottom of the bars in their drawing of 320 x 96."""

TITLES = {
    SELF: "Self-attention of the language model: from the answer's tokens to the visual tokens",
    CROSS: "Cross-attention: from the answer's tokens to the visual tokens",
}


def problem(sentence: str) -> str:
    """One sentence about what is not possible."""
    return _render("problem.html.jinja", sentence=sentence)


def table_of_runs(runs: Sequence[Shown]) -> str:
    """The table on top of the page."""
    return _render("head.html.jinja", runs=runs, rows=rows(runs))


def pictures(
    right: Sequence[Image],
    wrong: Sequence[Image],
    names: tuple[str, str],
    answers: Sequence[str] = (),
    problem: str = "",
) -> str:
    """The pictures that are asked about, side by side.

    Args:
        right: the pictures that the question is about.
        wrong: the others.
        names: where they are from.
        answers: what is right for the first.
        problem: one sentence about what cannot be used.
    """
    both = [("right", "✓ Right picture", names[0], right), ("wrong", "✗ Wrong picture", names[1], wrong)]
    found = [
        {"kind": kind, "title": title, "name": name, "pngs": [png_base64(preview(one)) for one in images],
         "small": any(min(one.shape[:2]) < SHOWN_SIDE for one in images)}
        for kind, title, name, images in both
    ]  # fmt: skip
    return _render("pictures.html.jinja", pictures=found, answers=" / ".join(answers), problem=problem)


def preview(image: Image) -> Image:
    """The picture, made smaller where it is large."""
    if max(image.shape[:2]) <= PREVIEW:
        return image
    small = Pillow.fromarray(image)
    small.thumbnail((PREVIEW, PREVIEW))
    return np.asarray(small)


def cards(shown: Sequence[Card], layer: str = MEAN) -> str:
    """The answers, those to the right picture in the first row, with their maps at a layer.

    Args:
        shown: the cards.
        layer: ``MEAN``, or the number of a layer from 1.
    """
    kinds = [{"cards": [_card(card, layer) for card in shown if card.wrong == wrong]} for wrong in (False, True)]
    return _render("cards.html.jinja", kinds=kinds, two=len({card.letter for card in shown}) > 1)


def layers(shown: Sequence[Card]) -> list[str]:
    """What can be chosen as layer."""
    most = max((len(w) for c in shown if c.attention is not None for w in c.attention.maps.values()), default=0)
    return [MEAN, *(str(k + 1) for k in range(most))]


def _card(card: Card, layer: str) -> dict[str, Any]:
    found, views = card.attention, []
    if found is not None:
        name = f"{card.letter}{'w' if card.wrong else 'r'}"
        views = [_view(found, kind, layer, f"{name}{k}") for k, kind in enumerate(found.maps)]
    return {
        "letter": card.letter, "name": card.name, "wrong": card.wrong, "state": card.state, "text": card.text,
        "note": card.note, "why_none": "" if found is None else found.why_none, "views": views,
        "chances": [] if found is None or found.maps else _tokens(found),
    }  # fmt: skip


def _view(found: Attention, kind: str, layer: str, name: str) -> dict[str, Any]:
    """One map with all tokens of the answer that can be chosen."""
    weights = found.maps[kind]  # (L, T, I, M)
    chosen, said = layer_of(weights, layer, "look" if kind == CROSS else "layer")
    each = [chosen.mean(0), *chosen]  # of (I, M)
    told = [{"text": "mean of all", "probability": ""}, *_tokens(found)]
    tokens = [
        {**token, "share": _share(w, kind), "peak": f"{w.max():.2g}"} for token, w in zip(told, each, strict=True)
    ]
    why_bars = "" if found.grid else (
        f"The {chosen.shape[-1]} visual tokens of this connector have no place in the picture, so that their weights "
        "are shown as bars and not over it."
    )  # fmt: skip
    return {
        "id": name, "title": f"{TITLES[kind]}; {said}.", "tokens": tokens, "why_bars": why_bars,
        "grid": " by ".join(map(str, found.grid or ())), "scale": scale(),
        "pictures": [_laid(found, k, each) for k in range(len(found.pictures))],
    }  # fmt: skip


def layer_of(weights: NDArray[np.float32], layer: str, word: str) -> tuple[NDArray[np.float32], str]:
    """(T, I, M) of (L, T, I, M) at a layer, or their mean, and that in words; a layer that is not there is the mean."""
    count = len(weights)
    if layer != MEAN and int(layer) <= count:
        return weights[int(layer) - 1], f"{word} {layer} of {count}, mean over heads"
    absent = "" if layer == MEAN else f" (there is no {word} {layer})"
    return weights.mean(0), f"mean over {count} {word}s{absent} and heads"


def _tokens(found: Attention) -> list[dict[str, str]]:
    pairs = zip(found.tokens, found.probabilities, strict=True)
    return [{"text": text.strip() or repr(text), "probability": f"{p:.2f}"} for text, p in pairs]


def _share(weights: NDArray[np.float32], kind: str) -> str:
    share = f"{float(weights.sum()):.0%}"
    if kind == SELF:
        return f"{share} of the attention is on the picture, the rest on words."
    return f"{share} of this attention is on the picture: it is over nothing else."


def _laid(found: Attention, k: int, each: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    """Picture k with what lies over it for every token, weights (I, M) each; or bars where these have no place."""
    height, width = found.pictures[k].shape[:2]
    laid = {"png": png_base64(preview(found.pictures[k])), "ratio": f"{width} / {height}", "heats": [], "bars": []}
    if found.grid is None:
        return {**laid, "bars": [[*bars(w[k], float(w.max()))] for w in each]}
    return {**laid, "heats": [heat_png(w[k].reshape(found.grid), float(w.max())) for w in each]}


def heat(share: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Shares from 0 to 1 of the largest weight -> RGBA: none of it is clear, all of it nearly covers the picture."""
    colours = (matplotlib.colormaps[COLOURS](share) * 255).astype(np.uint8)
    colours[..., 3] = (share**0.7 * DENSEST * 255).astype(np.uint8)
    return colours


@cache
def scale() -> str:
    """The legend's colours, as they are over grey."""
    stops = heat(np.linspace(0, 1, 17, dtype=np.float32)).astype(float)
    mixed = [GREY + (colour[:3] - GREY) * colour[3] / 255 for colour in stops]
    return f"linear-gradient(90deg, {', '.join('rgb(' + ', '.join(f'{c:.0f}' for c in one) + ')' for one in mixed)})"


def heat_png(weights: NDArray[np.float32], peak: float) -> str:
    """(R, C) weights as a PNG in base64, a pixel a visual token: colour and opacity by its share of `peak`."""
    colours = heat(np.clip(weights / max(peak, 1e-12), 0, 1))  # (R, C, 4)
    out = io.BytesIO()
    Pillow.fromarray(colours).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")


def bars(weights: NDArray[np.float32], peak: float) -> Iterator[Mapping[str, Any]]:
    """One bar a visual token."""
    left, right, top, bottom = BARS
    step = (right - left) / len(weights)
    for k, weight in enumerate(weights.tolist()):
        height = (bottom - top) * weight / max(peak, 1e-12)
        yield {
            "x": round(left + k * step, 2), "y": round(bottom - height, 2), "height": round(height, 2),
            "width": round(max(step * 0.85, 0.3), 2), "title": f"visual token {k + 1}: {weight:.4f}",
        }  # fmt: skip


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("vlmlab.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def _render(name: str, **what: Any) -> str:
    return _environment().get_template(name).render(**what)

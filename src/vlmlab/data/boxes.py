"""Boxes as text: the conventions in which the field's models write them, and how they are read back.

A box is four shares of the picture, ``(x0, y0, x1, y1)`` in 0..1 of its width and height, so that it survives any
resizing; pixels come in and go out by the picture's own size. Overlap is the same in shares as in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal, Protocol, TypeAlias, get_args

from vlmlab.contracts.errors import UserError

Box: TypeAlias = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)``, shares of width and height; the upper ends are where the box ends."""

Boxes = Literal["qwen_vl", "minigpt_v2", "shikra", "paligemma", "kosmos2"]
"""Whose convention."""
BOXES: tuple[Boxes, ...] = get_args(Boxes)


class BoxText(Protocol):
    """A convention: boxes to text and back."""

    def write(self, box: Box) -> str:
        """The box as text."""

    def read(self, text: str) -> Box | None:
        """The first box in a text; None where there is none."""

    def without(self, text: str) -> str:
        """The text without its boxes and marks of phrases."""

    def named(self, phrase: str) -> str:
        """A phrase that has a box, as it is marked before it."""


@dataclass(frozen=True)
class Corners:
    """Two corners, each coordinate as one of ``bins`` steps of its side, rounded to the nearest.

    Attributes:
        bins: steps of a side.
        last: the largest number that is written; the right and the lower edge of a picture may lie after it.
        template: the text, with four places.
        order: which of x0, y0, x1, y1 is at each place.
        phrase: how a phrase with a box is marked.
        decimals: digits after the point where shares are written; None: whole steps.
    """

    bins: int
    last: int
    template: str
    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    phrase: str = "{}"
    decimals: int | None = None

    def write(self, box: Box) -> str:
        """Nearest steps of each side."""
        steps = [min(max(round(box[k] * self.bins), 0), self.last) for k in self.order]
        told = steps if self.decimals is None else [f"{step / self.bins:.{self.decimals}f}" for step in steps]
        return self.template.format(*told)

    def read(self, text: str) -> Box | None:
        """The first box in a text, whatever is around it; None where there is none."""
        found = re.search(self._pattern, text)
        if found is None:
            return None
        values = [0.0] * 4
        for place, number in zip(self.order, found.groups(), strict=True):
            values[place] = float(number) / (self.bins if self.decimals is None else 1)
        return values[0], values[1], values[2], values[3]

    def without(self, text: str) -> str:
        """The text without its boxes and marks of phrases."""
        return _unmarked(re.sub(self._pattern, " ", text), self.phrase)

    def named(self, phrase: str) -> str:
        """A phrase that has a box, as it is marked before it."""
        return self.phrase.format(phrase)

    @property
    def _pattern(self) -> str:
        number = r"(\d{1,4})" if self.decimals is None else r"(\d?\.\d+|\d)"
        pieces = Formatter().parse(self.template)  # what is printed, and whether a number follows
        return "".join(re.escape(words) + (number if field is not None else "") for words, field, _, _ in pieces)


@dataclass(frozen=True)
class Patches:
    """The first and the last cell of a grid over the picture that a box touches, counted in raster order.

    Read back, a box ends at the middle of its cells, or where they are in one row or column at their edges.

    Attributes:
        bins: cells of a side.
    """

    bins: int = 32
    phrase: str = "<p>{}</p>"

    def write(self, box: Box) -> str:
        """The two cells."""
        x0, y0 = (min(int(value * self.bins), self.bins - 1) for value in box[:2])
        x1, y1 = (min(max(-int(-value * self.bins // 1) - 1, 0), self.bins - 1) for value in box[2:])
        return f"<box><loc_{y0 * self.bins + x0}><loc_{y1 * self.bins + x1}></box>"

    def read(self, text: str) -> Box | None:
        """The first box in a text; None where there is none, or a cell that the grid has not."""
        found = re.search(self._pattern, text)
        cells = [int(number) for number in found.groups()] if found else []
        if not cells or max(cells) >= self.bins**2:
            return None
        (y0, x0), (y1, x1) = (divmod(cell, self.bins) for cell in cells)
        inner = 0.0 if x0 == x1 or y0 == y1 else 0.5
        low, high = [x0 + inner, y0 + inner], [x1 + 1 - inner, y1 + 1 - inner]
        return low[0] / self.bins, low[1] / self.bins, high[0] / self.bins, high[1] / self.bins

    def without(self, text: str) -> str:
        """The text without its boxes and marks of phrases."""
        return _unmarked(re.sub(self._pattern, " ", text), self.phrase)

    def named(self, phrase: str) -> str:
        """A phrase that has a box, as it is marked before it."""
        return self.phrase.format(phrase)

    _pattern = r"<box><loc_(\d{1,7})><loc_(\d{1,7})></box>"


_PHRASE = "<p>{}</p>"
_CONVENTIONS: dict[Boxes, BoxText] = {
    "qwen_vl": Corners(1000, 999, "<box>({},{}),({},{})</box>", phrase="<ref>{}</ref>"),
    "minigpt_v2": Corners(100, 100, "{{<{}><{}><{}><{}>}}", phrase=_PHRASE),
    "shikra": Corners(1000, 1000, "[{},{},{},{}]", decimals=3),
    "paligemma": Corners(1024, 1023, "<loc{:04d}><loc{:04d}><loc{:04d}><loc{:04d}>", order=(1, 0, 3, 2)),
    "kosmos2": Patches(),
}
"""Qwen-VL (arXiv 2308.12966: 0 to 999), MiniGPT-v2 (2310.09478: 0 to 100), Shikra (2306.15195: three decimals),
PaliGemma (2407.07726: y before x, 1024 steps), KOSMOS-2 (2306.14824: 32 x 32 location tokens, here in words)."""


def box_text(boxes: Boxes, bins: int | None = None) -> BoxText:
    """A convention.

    Args:
        boxes: whose.
        bins: steps of a side; None: as many as its paper has.

    Raises:
        UserError: an unknown convention, or a number of steps that it cannot write.
    """
    if boxes not in _CONVENTIONS:
        raise UserError(f"boxes={boxes!r} is not a convention; choose from {', '.join(BOXES)}.")
    convention = _CONVENTIONS[boxes]
    if bins is None:
        return convention
    if not 2 <= bins <= 1024:
        raise UserError(f"bins={bins} cannot be written as a box's coordinates; give 2 to 1024, or null.")
    if isinstance(convention, Patches):
        return replace(convention, bins=bins)
    assert isinstance(convention, Corners)
    return replace(convention, bins=bins, last=bins - (convention.bins - convention.last))


def of_pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Pixels of a picture of so many rows and columns to shares of it."""
    height, width = size
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def to_pixels(box: Box, size: tuple[int, int]) -> Box:
    """Shares to pixels of a picture of so many rows and columns."""
    height, width = size
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, 0..1; 0 where one of them is empty or upside down."""
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    if any(box[2] <= box[0] or box[3] <= box[1] for box in (a, b)):
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / (areas[0] + areas[1] - both)


def _unmarked(text: str, phrase: str) -> str:
    for mark in phrase.split("{}"):
        text = text.replace(mark, " ") if mark else text
    return " ".join(text.split())

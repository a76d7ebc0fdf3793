"""The one way to a terminal: what others have written is shown there and never obeyed."""

from __future__ import annotations

import unicodedata
from typing import TextIO


def visible(text: str) -> str:
    """The text with every control character but the line's end as a picture of itself: a terminal obeys some."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(map(_picture, text))


def _picture(character: str) -> str:
    if character == "\n":
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    control = unicodedata.category(character) in ("Cc", "Cf", "Cs")
    return "\N{REPLACEMENT CHARACTER}" if control else character


def tell(text: object, out: TextIO | None = None, end: str = "\n") -> None:
    """Print a text with its control characters visible, at once.

    Args:
        text: what to say; it may hold captions, file names, or what libraries said of them.
        out: where to; standard output if None.
        end: what follows it.
    """
    print(visible(str(text)), file=out, end=end, flush=True)

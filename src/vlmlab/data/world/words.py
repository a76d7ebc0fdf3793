"""The words and the palette of each domain: everything by which ``base`` and ``shifted`` differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from vlmlab.contracts.errors import UserError

_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = (*_TO_TEN, "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen")
DIRECTIONS = ("left", "right", "above", "below")
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Lexicon:
    """One domain's vocabulary, palette and question templates.

    Attributes:
        domain: the name used in the configuration.
        colors: eight colour words; ``palette`` holds their RGB values.
        shapes: six shape words, drawn by ``draw.MASKS`` in this order; ``plurals`` likewise.
        sizes: (large, small); ``synonyms`` are what people also say in short captions.
        textures: two texture words, drawn by ``patterns``.
        second_tone: the pattern's other tone: a grey level, and how many tenths of the object's colour stay in it.
        background: lowest and highest grey level.
        noun, nouns: what an object is called when its shape is not named.
        picture: what an image is called.
        templates: question texts by ``kind/template``; two or three paraphrases each.
        short_prompts, dense_prompts: how each caption style is asked for.
    """

    domain: str
    colors: tuple[str, ...]
    palette: tuple[RGB, ...]
    shapes: tuple[str, ...]
    plurals: tuple[str, ...]
    sizes: tuple[str, str]
    synonyms: tuple[str, str]
    textures: tuple[str, str]
    patterns: tuple[str, str]
    second_tone: tuple[int, int]
    background: tuple[int, int]
    noun: str
    nouns: str
    picture: str
    templates: Mapping[str, tuple[str, ...]]
    short_prompts: tuple[str, ...]
    dense_prompts: tuple[str, ...]


_HOPS = {
    "row": "in the same row as",
    "column": "in the same column as",
    "nearest": "nearest to",
}


def _two_hop(noun: str) -> dict[str, tuple[str, ...]]:
    asked = {
        "color": "What color is the {noun} {hop} {ref}?",
        "shape": "What shape is the {noun} {hop} {ref}?",
        "size": "What size is the {noun} {hop} {ref}?",
        "texture": "What texture does the {noun} {hop} {ref} have?",
    }
    return {
        f"two_hop/{name}/{hop}": (text.replace("{noun}", noun).replace("{hop}", words),)
        for name, text in asked.items()
        for hop, words in _HOPS.items()
    }


_BASE = Lexicon(
    domain="base",
    colors=("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"),
    palette=(
        (225, 25, 25),
        (15, 185, 40),
        (30, 60, 235),
        (250, 235, 30),
        (150, 30, 190),
        (255, 135, 0),
        (40, 225, 235),
        (250, 250, 250),
    ),
    shapes=("circle", "square", "triangle", "diamond", "cross", "ring"),
    plurals=("circles", "squares", "triangles", "diamonds", "crosses", "rings"),
    sizes=("large", "small"),
    synonyms=("big", "little"),
    textures=("solid", "striped"),
    patterns=("solid", "stripes"),
    second_tone=(0, 1),
    background=(70, 115),
    noun="object",
    nouns="objects",
    picture="picture",
    templates={
        "attribute/color": ("What color is {ref}?", "Which color does {ref} have?"),
        "attribute/shape": ("What shape is {ref}?", "Which shape does {ref} have?"),
        "attribute/size": ("What size is {ref}?", "Is {ref} large or small?"),
        "attribute/texture": ("What texture does {ref} have?", "Is {ref} solid or striped?"),
        "existence": ("Is there {term}?", "Does the picture show {term}?"),
        "count": ("How many {terms} are there?", "How many {terms} does the picture show?"),
        "relation": ("Where is {ref} relative to {other}?", "Seen from {other}, where is {ref}?"),
        "comparison": ("Are there more {first} or {second}?", "Which are there more of, {first} or {second}?"),
        "position/row": ("Which row is {ref} in?", "In which row is {ref}?"),
        "position/column": ("Which column is {ref} in?", "In which column is {ref}?"),
        "interleaved/two": ("Which picture has more {terms}?",),
        "interleaved/three": ("Which picture has the most {terms}?",),
        **_two_hop("object"),
    },
    short_prompts=("Describe the picture briefly.", "Describe the picture in a few words.", "Give a short caption."),
    dense_prompts=("Describe the picture in detail.", "List every object in the picture.", "Give a full description."),
)

_SHIFTED = Lexicon(
    domain="shifted",
    colors=("pink", "brown", "navy", "teal", "olive", "black", "crimson", "lavender"),
    palette=(
        (255, 110, 190),
        (135, 75, 20),
        (15, 15, 115),
        (0, 145, 140),
        (125, 140, 0),
        (10, 10, 10),
        (190, 0, 40),
        (165, 130, 255),
    ),
    shapes=("disc", "block", "wedge", "lozenge", "plus", "loop"),
    plurals=("discs", "blocks", "wedges", "lozenges", "pluses", "loops"),
    sizes=("major", "minor"),
    synonyms=("major", "minor"),
    textures=("dotted", "checked"),
    patterns=("dots", "checks"),
    second_tone=(255, 5),
    background=(195, 225),
    noun="finding",
    nouns="findings",
    picture="scan",
    templates={
        "attribute/color": ("What is the tone of {ref}?", "Which tone does {ref} have?"),
        "attribute/shape": ("What is the form of {ref}?", "Which form does {ref} have?"),
        "attribute/size": ("What is the extent of {ref}?", "Is {ref} major or minor?"),
        "attribute/texture": ("What is the pattern of {ref}?", "Is {ref} dotted or checked?"),
        "existence": ("Does the scan show {term}?", "Can {term} be seen?"),
        "count": ("How many {terms} are visible?", "How many {terms} does the scan show?"),
        "relation": ("Where does {ref} lie relative to {other}?", "Seen from {other}, where is {ref}?"),
        "comparison": ("Are {first} or {second} more common?", "Which are more common, {first} or {second}?"),
        "position/row": ("Which row holds {ref}?", "In which row does {ref} lie?"),
        "position/column": ("Which column holds {ref}?", "In which column does {ref} lie?"),
        "interleaved/two": ("Which scan shows more {terms}?",),
        "interleaved/three": ("Which scan shows the most {terms}?",),
        **{
            key: tuple(
                text.replace("What color is", "What is the tone of")
                .replace("What shape is", "What is the form of")
                .replace("What size is", "What is the extent of")
                .replace("What texture does", "What is the pattern of")
                .replace(" have?", "?")
                for text in texts
            )
            for key, texts in _two_hop("finding").items()
        },
    },
    short_prompts=("Summarize the scan briefly.", "Give a short report."),
    dense_prompts=("Report the scan in detail.", "Give a full report."),
)

_LEXICONS = {lexicon.domain: lexicon for lexicon in (_BASE, _SHIFTED)}
Domain = Literal["base", "shifted"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)


def lexicon(domain: str) -> Lexicon:
    """The words of a domain.

    Raises:
        UserError: for an unknown domain.
    """
    if domain not in _LEXICONS:
        raise UserError(f"The world has no domain {domain!r}; set domain to one of: {', '.join(DOMAINS)}.")
    return _LEXICONS[domain]


COLOR, SHAPE, SIZE, TEXTURE = 1, 2, 4, 8
"""Bits of a mask that says which attributes a phrase names."""


@cache
def phrase(domain: str, mask: int, attributes: tuple[int, int, int, int], plural: bool = False) -> str:
    """Words for an object, such as ``large red striped circle``, without an article.

    Args:
        domain: whose words.
        mask: which attributes are named (sum of COLOR, SHAPE, SIZE, TEXTURE).
        attributes: (color, shape, size, texture) as indices; those not named are ignored.
        plural: ``circles`` instead of ``circle``.
    """
    words = lexicon(domain)
    color, shape, size, texture = attributes
    noun = words.nouns if plural else words.noun
    if mask & SHAPE:
        noun = (words.plurals if plural else words.shapes)[shape]
    parts = [
        words.sizes[size] if mask & SIZE else "",
        words.colors[color] if mask & COLOR else "",
        words.textures[texture] if mask & TEXTURE else "",
        noun,
    ]
    return " ".join(part for part in parts if part)


def with_article(words: str) -> str:
    """``a`` or ``an`` before the words."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"

"""Words of a caption as coco-caption counts them: Penn Treebank tokens, lower case, punctuation dropped.

coco-caption calls Stanford's PTBTokenizer (Java) and then removes a list of punctuation tokens. This is the part of
that tokenizer which captions use, as one regular expression.
"""

from __future__ import annotations

import re

ABBREVIATIONS = (
    "mr mrs ms dr prof st sr jr vs etc ave blvd rd ft mt gen col capt lt sgt gov sen rep rev hon "
    "inc corp bros dept est approx jan feb mar apr jun jul aug sep sept oct nov dec"
)
"""Words that keep their full stop."""

PUNCTUATION = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"} | set("()[]{}"))
"""Tokens that are not words (PUNCTUATIONS of coco-caption's tokenizer)."""

_TWO_PARTS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_TOKEN = re.compile(
    rf"""
      (?:[^\W\d_]\.){{2,}}                                # u.s.  a.m.
    | \b(?:{ABBREVIATIONS.replace(" ", "|")})\.(?=\W|$)    # mr.  st.
    | \bno\.(?=\s*\d)                                     # no. 5
    | \d+(?:[.,:/]\d+)+(?!\w)                             # 12:45  1,000  3.5  1/2
    | n't\b
    | '(?:s|m|d|ll|re|ve)\b                               # 's and its kin
    | \b(?:[dlo]'\w\w+|ma'am|y'all|c'mon)(?:-\w+)*        # o'clock  d'arnaud
    | \w+(?:[-/&@]\w+)*?(?=n't\b)                         # does|n't
    | \w+(?:[-/&@]\w+)*                                   # side-by-side  and/or
    | \.\.\.|--|''|``
    | [^\w\s]
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """The words of `text`: lower case, clitics split off ("it's" -> it, 's), punctuation dropped."""
    words = _TOKEN.findall(_plain(text))
    parts = [part for word in words for part in _TWO_PARTS.get(word, (word,))]
    return [part for part in parts if part not in PUNCTUATION]


def _plain(text: str) -> str:
    """Lower case with typewriter quotes; double quotes become spaces, because they are dropped and join nothing."""
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("\N{LEFT SINGLE QUOTATION MARK}", "'")
    text = text.replace("\N{HORIZONTAL ELLIPSIS}", "...").replace("\N{EM DASH}", " -- ").replace("\N{EN DASH}", " -- ")
    return re.sub('["\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}]', " ", text)

"""Control tokens of a tokenizer inside the words of a sample: written out there, they could begin or end a turn.

A tokenizer reads such a word as its control token wherever it is. So it is refused by row, or hidden while the
template is rendered and then read as ordinary characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import IMAGE_TAG, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ControlTokens: TypeAlias = Literal["refuse", "text"]
"""What becomes of control tokens in a sample's words."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte of a character that a SentencePiece tokenizer does not know: text, whatever its flags say."""

PRIVATE = range(0xE000, 0xF8FF)
"""Characters without a meaning, of which some stand for what is hidden."""


def controls_of(tokenizer: PreTrainedTokenizerBase, printed: str, image_token: str) -> list[str]:
    """The control tokens of a tokenizer, the longest first.

    They are its special tokens and what else was added to it and is in what the template prints by itself: some
    tokenizers do not say that their turns' ends are special. Other added words (``<think>``, runs of blanks) are text.
    """
    added = tokenizer.added_tokens_decoder.values()
    own = {token.content for token in added if token.special or (token.content.strip() and token.content in printed)}
    every = {*own, *tokenizer.all_special_tokens, image_token}
    return sorted((token for token in every if not BYTE.fullmatch(token)), key=len, reverse=True)


def any_of(words: Sequence[str]) -> re.Pattern[str]:
    """Matches the longest of these words."""
    return re.compile("|".join(map(re.escape, words)))


@dataclass(frozen=True)
class Hidden:
    """What is hidden in a text.

    Attributes:
        tokens: the character that fills a control token's place -> that token.
    """

    tokens: dict[str, str] = field(default_factory=dict)

    def shown(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text with everything where it was, and the spans of what was hidden."""
        if not self.tokens:
            return text, []
        places = re.compile("|".join(f"{fill}{{{len(token)}}}" for fill, token in self.tokens.items()))
        spans = [found.span() for found in places.finditer(text)]
        return places.sub(lambda found: self.tokens[found.group()[0]], text), spans


def guarded(sample: Sample, control: re.Pattern[str], image_token: str, keep: ControlTokens) -> tuple[Sample, Hidden]:
    """The sample with words that can forge nothing; image tags in its prompts stay.

    Raises:
        DataError: there is a control token among them and it is to be refused; names the sample.
    """
    words = [sample.system, *(text for turn in sample.turns for text in (turn.prompt, turn.answer))]
    if not any(control.search(text) or control.search(text.replace(IMAGE_TAG, "")) for text in words):
        return sample, Hidden()
    free = (chr(code) for code in PRIVATE if not any(chr(code) in text for text in words))
    fills: dict[str, str] = {}

    def hide(token: str) -> str:
        if keep == "refuse":
            raise DataError(_refusal(sample.id, token, image_token))
        if token not in fills:
            fills[token] = next(free)
        return fills[token] * len(token)

    def but_tags(text: str) -> str:
        parts = [_hidden(part, control, hide) for part in text.split(IMAGE_TAG)]
        if found := control.search("".join(parts)):  # where an image takes no position, its tag leaves no gap
            raise DataError(_refusal(sample.id, found.group(), image_token))
        return IMAGE_TAG.join(parts)

    turns = tuple(
        replace(turn, prompt=but_tags(turn.prompt), answer=_hidden(turn.answer, control, hide)) for turn in sample.turns
    )
    without = replace(sample, system=_hidden(sample.system, control, hide), turns=turns)
    return without, Hidden({fill: token for token, fill in fills.items()})


def _hidden(text: str, control: re.Pattern[str], hide: Callable[[str], str]) -> str:
    return control.sub(lambda found: hide(found.group()), text)


def _refusal(name: str, token: str, image_token: str) -> str:
    if token == image_token:
        return f"Sample {name} contains the placeholder {token} as text; use {IMAGE_TAG}."
    return (
        f"Sample {name} contains the control token {token} as text, which could begin or end a turn; take it out of "
        "the row, or keep it as plain characters by collate.control_tokens=text."
    )

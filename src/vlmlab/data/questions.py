"""Several questions about the same images: as a conversation, each by itself, or as the branches of one tree.

A tree is one row: first what all its questions begin with (the system line, the images), then each question with its
answer as a branch that sees nothing of the others and goes on at the same position. It teaches what as many rows teach,
one a question, and reads the images once. Molmo's training code does this with several annotations of one image
(`subsegment_ids`; arXiv 2409.17146).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample
from vlmlab.data.chat import ANSWER, Encoded

Questions: TypeAlias = Literal["conversation", "rows", "tree"]
"""How a sample of several turns is read: as it is, each turn by itself in a row, or all in one row as a tree."""

FRONT = re.compile(rf"(?:\s*{re.escape(IMAGE_TAG)})+\s*")


def leading_tags(sample: Sample) -> str | None:
    """The image tags that the first prompt begins with, with the blanks around them; empty where no tag is written.

    None where the questions cannot be asked apart from each other: there is no image, or one is elsewhere.
    """
    prompts = [turn.prompt for turn in sample.turns]
    if not sample.images:
        return None
    if not any(IMAGE_TAG in prompt for prompt in prompts):
        return ""
    found = FRONT.match(prompts[0])
    tags = found.group() if found else ""
    everywhere = sum(prompt.count(IMAGE_TAG) for prompt in prompts)
    return tags if tags.count(IMAGE_TAG) == everywhere == len(sample.images) else None


def split_questions(sample: Sample) -> list[Sample]:
    """Every turn as a sample of its own: the system line, the images, this question; as a benchmark asks it.

    A turn without an answer, from which nothing is learnt, is left out. A sample stays one conversation where it has a
    single turn, no image (its turns have only each other to be about), or an image elsewhere than at its beginning.
    """
    tags = leading_tags(sample)
    answered = [turn for turn in sample.turns if turn.answer]
    if tags is None or len(sample.turns) < 2 or not answered:
        return [sample]
    asked = [turn if turn is sample.turns[0] else replace(turn, prompt=tags + turn.prompt) for turn in answered]
    return [replace(sample, turns=(turn,)) for turn in asked]


def of_same_images(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Numbers of the samples in order, in groups of those that follow each other and begin with the same images."""
    group: list[int] = []
    for number, sample in enumerate(samples):
        if group and not _begins_as(sample, samples[group[0]]):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _begins_as(sample: Sample, other: Sample) -> bool:
    """Whether two samples have the same system line and, at their beginning, the same images."""
    named = sample.image_ids == other.image_ids and sample.system == other.system
    tags = leading_tags(sample)
    if not named or tags is None or tags != leading_tags(other) or len(sample.images) != len(other.images):
        return False
    return all(np.array_equal(a, b) for a, b in zip(sample.images, other.images, strict=True))


def within(parts: Sequence[Encoded], limit: int, trunk: int | None = None) -> Iterator[Sequence[Encoded]]:
    """The questions of one sample, in order, for trees of at most `limit` tokens; a single one may be longer.

    Args:
        parts: each question with all that is before it.
        limit: most tokens of a tree.
        trunk: with how many tokens they begin; None: `shared`.
    """
    trunk = shared(parts) if trunk is None else trunk
    start, room = 0, limit - trunk
    for k, part in enumerate(parts):
        own = len(part.ids) - trunk
        if k > start and own > room:
            yield parts[start:k]
            start, room = k, limit - trunk
        room -= own
    yield parts[start:]


def shared(parts: Sequence[Encoded]) -> int:
    """With how many tokens all questions begin; each keeps at least one that it does not answer with.

    So the first token of a branch is never learnt: nothing of its own would predict it.
    """
    most = min(next((i for i, role in enumerate(e.roles) if role == ANSWER), len(e.ids)) for e in parts) - 1
    first = parts[0]
    same = (all(_token(e, i) == _token(first, i) for e in parts) for i in range(most))
    return next((i for i, equal in enumerate(same) if not equal), max(most, 0))


def _token(encoded: Encoded, index: int) -> tuple[int, int, int]:
    return encoded.ids[index], encoded.roles[index], encoded.image[index]


def joined(parts: Sequence[Encoded], name: str, trunk: int | None = None) -> Encoded:
    """The questions of one sample as a tree; a single one as it is.

    Args:
        parts: each question with all that is before it.
        name: of the sample, for the sentence.
        trunk: with how many tokens they begin; None: `shared`.

    Raises:
        UserError: an image is after something that differs between the questions.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    trunk = shared(parts) if trunk is None else trunk
    last = max((i + 1 for i, image in enumerate(first.image) if image >= 0), default=0)
    if any(e.places != first.places for e in parts) or max([last, *first.places]) > trunk:
        raise UserError(
            f"Sample {name}: the chat template puts something of each question before its images, so that the "
            "questions cannot share them; set collate.questions=rows and evaluation.share_images=false."
        )

    def row(field: str) -> list[int]:
        return [*getattr(first, field)[:trunk], *(value for e in parts for value in getattr(e, field)[trunk:])]

    return Encoded(
        ids=row("ids"),
        labels=row("labels"),
        roles=row("roles"),
        image=row("image"),
        places=first.places,
        turns=first.turns,
        branch=[-1] * trunk + [k for k, e in enumerate(parts) for _ in e.ids[trunk:]],
    )

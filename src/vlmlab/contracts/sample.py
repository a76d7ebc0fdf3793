"""What every data source yields, a Sample of images and turns, and what scores answers. Free of torch and any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IMAGE_TAG = "<image>"
"""Where an image is inside a turn's prompt. A sample with images but no tag gets them before its first prompt."""

Image = NDArray[np.uint8]
"""One RGB image, ``(H, W, 3)`` uint8, any size; resizing to the encoder's size happens in the collator."""


@dataclass(frozen=True)
class Turn:
    """One exchange: what is asked and what is to be answered.

    Attributes:
        prompt: the user's words, possibly with ``IMAGE_TAG`` where an image is; empty for plain text.
        answer: the words to be learnt or compared with.
        kind: what sort of question this is ("count", "caption", ...); scores are reported per kind.
        references: all acceptable answers (captions have several); empty means ``(answer,)``.
        chance: accuracy in 0..1 of the best answer that never looks at the image; None where unknown.
        group: a part of the benchmark that is scored apart, across the kinds ("held_out_pair"); empty where there are
            none. Left out of the repr, which covers the text alone (its hash fixes the embedded world's samples).
        options: the answers to choose from, the right one among them; empty where the answer is free. Left out of the
            repr, likewise.
    """

    prompt: str
    answer: str
    kind: str = ""
    references: tuple[str, ...] = ()
    chance: float | None = None
    group: str = field(default="", repr=False)
    options: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sample:
    """One training row or one benchmark item.

    Attributes:
        id: unique within its data set and stable between runs; error messages and predictions name it.
        images: the images in the order in which their tags are in the turns; may be empty.
        turns: one or more exchanges about these images.
        system: the system line of the conversation; empty keeps the chat template's own.
        image_ids: one stable name per image (a file, or split and scene number), used by the shuffled baseline.
    """

    id: str
    images: tuple[Image, ...]
    turns: tuple[Turn, ...]
    system: str = ""
    image_ids: tuple[str, ...] = field(default=())


class SampleSource(Protocol):
    """A data set: random access to samples, the same sample for the same index on every machine.

    One that can tell a sample's turns without making its images has a method ``turns(index)`` too; see `turns_of`.
    Where that costs next to nothing, because all records are in memory, it says so by ``turns_in_memory = True``.
    One made of files, or of other sources, has a method ``fingerprint()``: plain values that change with its content,
    see ``vlmlab.data.fingerprint``.
    One that is read from its beginning to its end (a stream) says by ``in_blocks`` how many samples it holds at a time:
    training shuffles within such blocks and goes through them in order, since going back means to begin again.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class Metric(Protocol):
    """What a metric is: rows of predictions in, named scores of the whole set out, over all ranks.

    One that is not defined over a single row says how many it needs by ``least_rows``. One whose comparison loses some
    answers altogether has ``loses(answer)``, so that a set with such answers is noted.
    """

    def update(self, prediction: Any) -> None:
        """Add one row (``vlmlab.evaluate.metrics.rows.Row``)."""

    def predicted(self) -> dict[str, float]:
        """The scores that depend on the predictions; all that a baseline needs."""

    def compute(self, floors: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
        """``predicted()`` and what describes the set: counts, chance levels, ceilings, scores above the highest floor.

        Args:
            floors: what ``predicted()`` gave for every other set of answers to the same questions, by its name.
        """


@runtime_checkable
class AnswerMetric(Metric, Protocol):
    """A metric one of whose scores is the mean over single answers, so that its error over questions is known.

    Attributes:
        of_answers: the name of that score.
    """

    of_answers: str

    def score(self, prediction: Any) -> float:
        """The score of one row."""


def references(turn: Turn) -> Sequence[str]:
    """All acceptable answers of a turn, never empty."""
    return turn.references or (turn.answer,)


def turns_of(source: SampleSource, index: int) -> Sequence[Turn]:
    """The turns of a sample, without rendering or decoding an image where the source has a method ``turns(index)``."""
    told = getattr(source, "turns", None)
    turns: Sequence[Turn] = source[index].turns if told is None else told(index)
    return turns

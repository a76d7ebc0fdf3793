"""Examples before a question: a benchmark whose every question follows k others with their images and answers.

Flamingo's in-context evaluation (arXiv 2204.14198), for any benchmark of single questions. The controls: examples whose
answers are another question's (what is left is their form), and examples without their images (the text-only
exemplars of Med-PaLM M, arXiv 2307.14334).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import IMAGE_TAG, Sample, SampleSource, Turn, turns_of
from vlmlab.contracts.values import Natural, Seed
from vlmlab.data.fingerprint import Facts, source_fingerprint
from vlmlab.data.overlap import Stored
from vlmlab.data.skipped import Skipped, label, next_usable

Answers = Literal["right", "shuffled"]
ANSWERS: tuple[Answers, ...] = get_args(Answers)
_TRIES = 64
"""Draws for an example of the question's own kind before any will do."""


class FewShot:
    """The samples of a benchmark, each after `shots` examples as earlier turns of its conversation.

    Which examples a question gets follows from `seed` and its number alone: drawn from the pool without repetition,
    of the question's own kind where 64 draws find one. With fewer shots they are the first of those with more.

    Args:
        source: the benchmark; a sample is one question.
        pool: where examples come from, single questions too: a training split.
        shots: examples before each question; 0 leaves the benchmark as it is.
        answers: ``right``, or ``shuffled``: each example has the answer of another one of its kind.
        shown: whether examples have their images.
        seed: of the choice.

    Attributes:
        skipped: what the benchmark has left out.

    Raises:
        UserError: an unknown word, or a pool with fewer samples than examples.
    """

    def __init__(
        self,
        source: SampleSource,
        pool: SampleSource,
        shots: Natural = 4,
        answers: Answers = "right",
        shown: bool = True,
        seed: Seed = 0,
    ) -> None:
        if answers not in ANSWERS:
            raise UserError(f"answers={answers!r} is unknown; choose from {', '.join(ANSWERS)}.")
        if len(pool) <= shots:
            raise UserError(f"A pool of {len(pool)} samples is too small for shots={shots}; give a larger one.")
        self.source, self.pool = source, pool
        self.shots, self.answers, self.shown, self.seed = shots, answers, shown, seed
        self.skipped: list[Skipped] = list(getattr(source, "skipped", []))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        if not self.shots:
            return sample
        examples = self._examples(index, sample)
        before = tuple(_tagged(example) for example in examples)
        images = tuple(image for example in examples for image in example.images)
        own = _tagged(sample)
        return replace(
            sample,
            images=(*images, *sample.images),
            image_ids=(*(name for example in examples for name in _names(example)), *_names(sample)),
            turns=(*(turn for turns in before for turn in turns), *own),
        )

    def label(self, index: int) -> str:
        """The id of a sample, without loading it."""
        return label(self.source, index)

    def stored(self, most: int) -> Iterator[Stored]:
        """The benchmark's images; those of the examples are training's."""
        if (told := getattr(self.source, "stored", None)) is not None:
            yield from told(most)

    def fingerprint(self) -> Facts:
        """Those of both sources, and how examples are chosen."""
        chosen = {"shots": self.shots, "answers": self.answers, "shown": self.shown, "seed": self.seed}
        return {"source": source_fingerprint(self.source), "pool": source_fingerprint(self.pool), **chosen}

    def _examples(self, index: int, sample: Sample) -> list[Sample]:
        """The examples of a question, with other images and answers as asked for."""
        draw, others = _generator("examples", self.seed, index), _generator("answers", self.seed, index)
        kind, taken = sample.turns[-1].kind, set[int]()
        found: list[Sample] = []
        for _ in range(self.shots):
            example = next_usable(self.pool, self._place(draw, kind, taken, sample.id), None, [])
            if len(example.turns) != 1:
                raise UserError(
                    f"Sample {example.id} of the pool has {len(example.turns)} turns; give single questions."
                )
            if self.answers == "shuffled":
                other = turns_of(self.pool, self._place(others, kind, set(), sample.id))[0]
                example = _said(example, answer=other.answer, references=other.references)
            if not self.shown:
                words = example.turns[0].prompt.replace(IMAGE_TAG, "").strip()
                example = _said(replace(example, images=(), image_ids=()), prompt=words)
            found.append(example)
        return found

    def _place(self, draw: np.random.Generator, kind: str, taken: set[int], name: str) -> int:
        """A place in the pool that was not taken yet, of this kind if one is met, and not the question itself."""
        free = 0
        for _ in range(_TRIES):
            place = int(draw.integers(len(self.pool)))
            if place in taken or label(self.pool, place) == name:
                continue
            free = place
            if turns_of(self.pool, place)[0].kind == kind:
                break
        taken.add(free)
        return free


def _said(sample: Sample, **changes: Any) -> Sample:
    """The sample with its one turn changed."""
    return replace(sample, turns=(replace(sample.turns[0], **changes),))


def _generator(purpose: str, seed: int, index: int) -> np.random.Generator:
    key = hashlib.sha256(f"few shot/{purpose}/{seed}/{index}".encode()).digest()
    return np.random.Generator(np.random.PCG64([int(word) for word in np.frombuffer(key, dtype="<u4")]))


def _tagged(sample: Sample) -> tuple[Turn, ...]:
    """The turns with a tag for every image, which samples without tags leave out."""
    if not sample.images or any(IMAGE_TAG in turn.prompt for turn in sample.turns):
        return sample.turns
    first = sample.turns[0]
    return (replace(first, prompt=f"{IMAGE_TAG * len(sample.images)}{first.prompt}"), *sample.turns[1:])


def _names(sample: Sample) -> tuple[str, ...]:
    return sample.image_ids or tuple(f"{sample.id}#{k}" for k in range(len(sample.images)))

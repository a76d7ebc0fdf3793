"""Samples -> Batch: the only place that knows where each image is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Image, Sample
from vlmlab.contracts.tensors import Batch, Images, Kind, Layout
from vlmlab.data.chat import IGNORE, SYSTEM, ChatEncoder, Encoded, questions_of
from vlmlab.data.options import answered, prompt_length
from vlmlab.data.questions import Questions, joined, of_same_images, split_questions, within

Resize = Callable[[Image], Image]
TRIED = 32
"""About how many limits on a row's length are tried before a batch is packed."""


@dataclass(frozen=True)
class Collator:
    """Tokenises, pads or packs, and lays out one micro-batch.

    Attributes:
        encoder: the chat encoder of the LM's tokenizer.
        resize: (H, W, 3) -> (3, h, w) uint8 as the tower wants it; None where no tower is built.
        pad_id: filler of ``input_ids``; never attended to.
        pack_length: pack several samples into rows of at most this many tokens; None pads every sample to a row.
        prompt_tokens: soft prompts before every sample, as the ids -1, -2, ... of role system.
        text: what the user says to each image -> its (I, T) ids for the encoder's text tower; None: nothing reads it.
        questions: what becomes of a sample of several turns, and with "tree" of prompts about the same images.
    """

    encoder: ChatEncoder
    resize: Resize | None
    pad_id: int
    pack_length: int | None = None
    prompt_tokens: int = 0
    text: Callable[[Sequence[str]], Tensor] | None = None
    questions: Questions = "conversation"

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """A training batch: answers supervised, padded on the right."""
        read = [(sample, part) for sample in samples for part in self.encode(sample)]
        rows = pack([len(e.ids) for _, e in read], self.pack_length)
        return self._batch([sample for sample, _ in read], [e for _, e in read], rows, left=False)

    def encode(self, sample: Sample) -> list[Encoded]:
        """What a sample is in training: a conversation, a row for each question, or trees of at most ``max_length``.

        Raises:
            DataError: it cannot be used; names the sample.
            UserError: the chat template allows no trees.
        """
        apart = [sample] if self.questions == "conversation" else split_questions(sample)
        parts = [_prompted(self.encoder.train(one), self.prompt_tokens) for one in apart]
        if self.questions != "tree" or len(parts) == 1:
            return parts
        return [joined(some, sample.id) for some in within(parts, self.encoder.max_length)]

    def ask(self, samples: Sequence[Sample]) -> Batch:
        """Prompts for generation: nothing supervised, padded on the left, one sample a row.

        With trees, samples that follow each other and show the same images are the branches of one row, in order.
        """
        encoded = [_prompted(self.encoder.ask(sample), self.prompt_tokens) for sample in samples]
        groups = of_same_images(samples) if self.questions == "tree" else ([i] for i in range(len(samples)))
        trees = [(samples[some[0]], joined([encoded[i] for i in some], samples[some[0]].id)) for some in groups]
        return self._batch([s for s, _ in trees], [e for _, e in trees], [[i] for i in range(len(trees))], left=True)

    def choose(self, samples: Sequence[Sample]) -> Batch:
        """Each option of every sample's last turn as its answer, supervised, in the order of samples and options.

        A sample is a tree whose branches are the options, behind one prompt (several where they would be longer than
        ``max_length``), and with a single option a row; padded on the right.

        Raises:
            DataError: a sample has no options, or cannot be used.
            UserError: the chat template has another prompt before another answer.
        """
        read: list[tuple[Sample, Encoded]] = []
        for sample in samples:
            parts = [_prompted(part, self.prompt_tokens) for part in answered(self.encoder, sample)]
            trunk = prompt_length(parts, sample.id)
            groups = within(parts, self.encoder.max_length, trunk)
            read += [(sample, joined(some, sample.id, trunk)) for some in groups]
        return self._batch([s for s, _ in read], [e for _, e in read], [[i] for i in range(len(read))], left=False)

    def _batch(self, samples: Sequence[Sample], encoded: list[Encoded], rows: list[list[int]], left: bool) -> Batch:
        if not samples:
            raise ValueError("a batch needs at least one sample")
        ids, labels, layout = _lay_out([[encoded[i] for i in row] for row in rows], self.pad_id, left)
        shown = (
            [] if self.resize is None else [(i, k) for row in rows for i in row for k in range(len(samples[i].images))]
        )
        return Batch(
            pixels=self._pixels([(samples[i].id, samples[i].images[k]) for i, k in shown]),
            input_ids=ids,
            labels=labels,
            layout=layout,
            images=_image_table(samples, encoded, rows, ids.shape[1], left) if shown else Images.none(),
            sample_ids=[[samples[i].id for i in row] for row in rows],
            text_ids=self._text_ids(samples, rows) if shown else None,
        )

    def _text_ids(self, samples: Sequence[Sample], rows: list[list[int]]) -> Tensor | None:
        if self.text is None:
            return None
        return self.text([text for row in rows for i in row for text in questions_of(samples[i])])

    def _pixels(self, images: list[tuple[str, Image]]) -> Tensor:
        if not images or self.resize is None:
            return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return torch.from_numpy(np.stack([resized(self.resize, image, name) for name, image in images]))  # (I, 3, H, W)


def resized(resize: Resize, image: Image, name: str) -> Image:
    """The image as the tower takes it; raises DataError, naming the sample, where the memory does not hold that."""
    try:
        return resize(image)
    except MemoryError:
        height, width = image.shape[:2]
        problem = f"its image of {width} x {height} pixels does not fit the memory when it is resized"
        raise DataError(f"Sample {name}: {problem}; shrink the image or remove the row") from None


def _image_table(
    samples: Sequence[Sample], encoded: list[Encoded], rows: list[list[int]], width: int, left: bool
) -> Images:
    """Where every image belongs, in the order of the pixels."""
    entries: list[tuple[int, ...]] = []
    for r, row in enumerate(rows):
        at = width - sum(len(encoded[i].ids) for i in row) if left else 0
        for segment, i in enumerate(row):
            e = encoded[i]
            for k, image in enumerate(samples[i].images):
                tokens = e.image.count(k)
                entries.append((r, segment, at + e.places[k], e.turns[k], tokens, image.shape[0], image.shape[1]))
            at += len(e.ids)
    table = torch.tensor(entries, dtype=torch.long)  # (I, 7)
    none = torch.zeros(len(entries), dtype=torch.long)
    return Images(
        row=table[:, 0],
        segment=table[:, 1],
        place=table[:, 2],
        turn=table[:, 3],
        frame=none,
        tile=none,
        hw=table[:, 5:],
        tokens=table[:, 4],
        ids=[_image_id(samples[i], k) for row in rows for i in row for k in range(len(samples[i].images))],
    )


def _image_id(sample: Sample, index: int) -> str:
    return sample.image_ids[index] if sample.image_ids else f"{sample.id}#{index}"


def _prompted(encoded: Encoded, count: int) -> Encoded:
    """The sample after `count` soft prompts."""
    if not count:
        return encoded
    return replace(
        encoded,
        ids=[*range(-1, -count - 1, -1), *encoded.ids],
        labels=[IGNORE] * count + encoded.labels,
        roles=[SYSTEM] * count + encoded.roles,
        image=[-1] * count + encoded.image,
        places=[place + count for place in encoded.places],
    )


def pack(lengths: list[int], limit: int | None) -> list[list[int]]:
    """Which samples share a row: of several ways, the one whose rows, all as wide as the widest, take the least room.

    A tight limit on a row often wastes less than the whole of it: two samples of 140 fill no row of 256.
    """
    if limit is None:
        return [[i] for i in range(len(lengths))]
    longest = max(lengths)
    limits = range(longest, max(longest, limit) + 1, max(1, (limit - longest) // TRIED))
    return min((_first_fit(lengths, each) for each in limits), key=lambda rows: _room(lengths, rows))


def _room(lengths: list[int], rows: list[list[int]]) -> tuple[int, int]:
    """Tokens of the padded batch, then its width, since attention costs more in wider rows."""
    width = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * width, width


def _first_fit(lengths: list[int], limit: int) -> list[list[int]]:
    """The longest first, each into the first row with room for it; rows and what is in them in the given order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, left in enumerate(room):
            if lengths[index] <= left:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(limit - lengths[index])
    return sorted(sorted(row) for row in rows)


def _lay_out(rows: list[list[Encoded]], pad_id: int, left: bool) -> tuple[Tensor, Tensor, Layout]:
    """Pads the rows to one length and describes every position."""
    width = max(sum(len(e.ids) for e in row) for row in rows)
    shape = (len(rows), width)
    ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    kind = np.full(shape, int(Kind.PAD), np.int64)
    role, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    image, tile, segment, branch = (np.full(shape, -1, np.int64) for _ in range(4))
    for r, row in enumerate(rows):
        at = width - sum(len(e.ids) for e in row) if left else 0
        first_image = 0
        for s, e in enumerate(row):
            here = slice(at, at + len(e.ids))
            own = np.asarray(e.image)
            ids[r, here], labels[r, here], role[r, here] = e.ids, e.labels, e.roles
            kind[r, here] = np.where(own >= 0, int(Kind.VISUAL), int(Kind.TEXT))
            image[r, here] = np.where(own >= 0, own + first_image, -1)
            tile[r, here] = np.where(own >= 0, 0, -1)
            segment[r, here], branch[r, here], position[r, here] = s, *_branches(e)
            at, first_image = here.stop, first_image + int(own.max(initial=-1)) + 1
    as_tensor = torch.from_numpy
    layout = Layout(
        kind=as_tensor(kind),
        image=as_tensor(image),
        tile=as_tensor(tile),
        segment=as_tensor(segment),
        role=as_tensor(role),
        position=as_tensor(position),
        branch=as_tensor(branch),
    )
    return as_tensor(ids), as_tensor(labels), layout


def _branches(encoded: Encoded) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The branch of every token, and its position: each branch goes on after what all share."""
    branch = np.asarray(encoded.branch or [-1] * len(encoded.ids), np.int64)
    begins = np.searchsorted(branch, branch)  # the shared part has -1 and comes first
    return branch, np.arange(len(branch)) - begins + np.where(branch < 0, 0, (branch < 0).sum())

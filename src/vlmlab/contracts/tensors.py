"""Layout, Images, Visual, Batch: how the collator, the masks, the fusions and the objectives speak to each other.

Shapes: B rows, S positions, I images, N features of an image, M visual tokens of an image, D the LM's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from vlmlab.contracts.watch import Watch


class Kind(IntEnum):
    """What a position holds."""

    PAD = 0
    TEXT = 1
    VISUAL = 2


class Role(IntEnum):
    """Who speaks at a position. Everything that is not an answer is system or user."""

    SYSTEM = 0
    USER = 1
    ANSWER = 2


@dataclass(frozen=True)
class Layout:
    """What each position of a batch is; every field is an integer tensor of shape (B, S).

    Attributes:
        kind: a ``Kind``.
        image: index of the image within its row that a visual token belongs to, -1 for text.
        tile: index of the tile within that image, -1 for text.
        segment: which packed sample of the row, -1 for padding.
        role: a ``Role``.
        position: position id within the segment, from 0; every branch goes on where the shared positions end.
        branch: which question of a tree, -1 for what all of them share (its images always, and all of any other
            sample) and for padding; left out: there are no trees.
    """

    kind: Tensor
    image: Tensor
    tile: Tensor
    segment: Tensor
    role: Tensor
    position: Tensor
    branch: Tensor = None  # type: ignore[assignment]  # a tensor from here on

    def __post_init__(self) -> None:
        given: Any = self.branch
        if given is None:
            object.__setattr__(self, "branch", torch.full_like(self.segment, -1))

    @staticmethod
    def of_text(valid: Tensor) -> Layout:
        """The layout of right-padded text of role user, one sample a row; (B, S) bool marks the real tokens."""
        none = torch.full_like(valid, -1, dtype=torch.long)
        return Layout(
            kind=torch.where(valid, int(Kind.TEXT), int(Kind.PAD)),
            image=none,
            tile=none,
            segment=torch.where(valid, 0, -1),
            role=torch.full_like(none, int(Role.USER)),
            position=torch.arange(valid.shape[1], device=valid.device).expand_as(none),
        )

    @property
    def visual(self) -> Tensor:
        """(B, S) bool: the positions that hold visual tokens."""
        return self.kind.eq(int(Kind.VISUAL))

    @property
    def valid(self) -> Tensor:
        """(B, S) bool: everything but padding."""
        return self.kind.ne(int(Kind.PAD))

    @property
    def era(self) -> Tensor:
        """(B, S): number of answer tokens before a position within its segment (the leak rule's clock).

        Of a tree, those of the position's own branch and of what all branches share.
        """
        answer = self.role.eq(int(Role.ANSWER)) & self.valid
        sample = self.segment[:, 1:] != self.segment[:, :-1]  # packed samples are contiguous, and so are branches
        shared = _before(answer & (self.branch < 0), sample)
        return shared + _before(answer & (self.branch >= 0), sample | (self.branch[:, 1:] != self.branch[:, :-1]))

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device."""
        return Layout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, rows: Tensor) -> Layout:
        """The layout of some rows, in the given order (rows may repeat)."""
        return Layout(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    def at(self, positions: Tensor) -> Layout:
        """The layout of some positions (Q,) of every row, in the given order."""
        return Layout(**{f.name: getattr(self, f.name).index_select(1, positions) for f in fields(self)})

    def extended(self, length: int) -> Layout:
        """The layout with text of role answer appended until it has `length` positions (generated tokens)."""
        extra = length - self.kind.shape[1]
        if extra <= 0:
            return self
        rows = self.kind.shape[0]

        def tail(value: int | Tensor) -> Tensor:
            filled = torch.as_tensor(value, device=self.kind.device, dtype=self.kind.dtype)
            return filled.reshape(-1, 1).expand(rows, extra)

        steps = torch.arange(1, extra + 1, device=self.kind.device, dtype=self.kind.dtype)
        new = {
            "kind": tail(int(Kind.TEXT)),
            "image": tail(-1),
            "tile": tail(-1),
            "segment": tail(self.segment[:, -1]),
            "role": tail(int(Role.ANSWER)),
            "position": self.position[:, -1:] + steps,
            "branch": tail(self.branch[:, -1]),
        }
        return Layout(**{name: torch.cat([getattr(self, name), value], 1) for name, value in new.items()})


def _before(counted: Tensor, new: Tensor) -> Tensor:
    """(B, S): how many counted positions (B, S) are before each since the last start; (B, S - 1) bool marks starts."""
    before = counted.long().cumsum(1) - counted.long()
    place = torch.arange(counted.shape[1], device=counted.device)
    starts = torch.cat([torch.zeros_like(place[:1]).expand(len(new), 1), torch.where(new, place[1:], 0)], 1)
    return before - before.gather(1, starts.cummax(1).values)


@dataclass(frozen=True)
class Images:
    """The images of a batch, one entry each, in the order of ``Batch.pixels``; also those that take no position.

    Attributes:
        row: (I,) the row it belongs to.
        segment: (I,) its packed sample within the row.
        place: (I,) index of its first visual token in the row, or of the token that it is before.
        turn: (I,) number of answers of its sample before it.
        frame: (I,) index of the frame of a video, 0 for a picture.
        tile: (I,) index of the tile of a larger picture, 0 for a whole one.
        hw: (I, 2) rows and columns of pixels of the picture as it was read.
        tokens: (I,) visual tokens it has in the sequence; 0 where vision does not enter it.
        ids: one name an image.
    """

    row: Tensor
    segment: Tensor
    place: Tensor
    turn: Tensor
    frame: Tensor
    tile: Tensor
    hw: Tensor
    tokens: Tensor
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def slots(self, rows: int) -> Tensor:
        """(rows, J) indices of the images of every row in their order, -1 after the last; J is the most of any row."""
        own = self.row[None] == torch.arange(rows, device=self.row.device)[:, None]  # (B, I)
        most = int(own.sum(1).max()) if len(self) else 0
        order = (~own).long().argsort(dim=1, stable=True)[:, :most]  # (B, J) the row's own first
        return order.masked_fill(~own.gather(1, order), -1)

    @staticmethod
    def none(device: torch.device | str = "cpu") -> Images:
        """The table of a batch without images."""
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return Images(empty, empty, empty, empty, empty, empty, empty.reshape(0, 2), empty, [])

    def to(self, device: torch.device | str) -> Images:
        """The same table on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "ids"})


@dataclass(frozen=True)
class Visual:
    """What an encoder returns.

    Attributes:
        grids: one (I, N, Dv) tensor per requested layer or tower.
        pooled: (I, Dv) or None where the tower has no pooled output.
        hw: (I, 2) rows and columns of the feature grid.
    """

    grids: list[Tensor]
    pooled: Tensor | None
    hw: Tensor


@dataclass(frozen=True)
class Seen:
    """What the model saw of a batch; empty where the batch has no image.

    Attributes:
        visual: what the encoder returned, after the fusion's change of features; None without an image.
        tokens: (I, M, D) the connector's visual tokens; None without an image.
    """

    visual: Visual | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """The positions (B, S) in two kinds: those that a fusion computes in its own way, and the others.

    Attributes:
        own: (B, S) bool: those that a fusion computes in its own way.
        here: (V,) their indices among all B * S.
        rest: (B * S - V,) those of the others.
        back: (B * S,) where each position is in [here; rest].
        rows: (B, R) indices within a row of the others, then of its own; R is the most others of any row.
    """

    own: Tensor
    here: Tensor
    rest: Tensor
    back: Tensor
    rows: Tensor

    @classmethod
    def of(cls, own: Tensor) -> Split:
        """By what is a fusion's own (B, S)."""
        flat = own.flatten()
        order = (~flat).long().argsort(stable=True)  # (B * S,)
        count, most = int(flat.sum()), int((~own).sum(1).max())
        rows = own.long().argsort(dim=1, stable=True)[:, :most]  # (B, R)
        return cls(own, order[:count], order[count:], order.argsort(), rows)


@dataclass(frozen=True)
class Memory:
    """What a fusion hands to the LM's layers.

    Attributes:
        tensors: by name, each (I, ...): what the blocks read of every image, computed once for all layers and steps.
        sees: (B, S, I) bool: which images a position sees.
        slots: (B, J) the images of every row, ``Images.slots``.
        split: which positions the fusion computes in its own way; None where it has no such.
        notes: by name what a block says of this batch, for objectives. It writes the same at every call, so that
            recomputed activations change nothing.
        watch: keeps the weights of the blocks' attention; None: they are not needed.
    """

    tensors: dict[str, Tensor]
    sees: Tensor
    slots: Tensor
    split: Split | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)
    watch: Watch | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch, as the collator builds it.

    Attributes:
        pixels: (I, 3, H, W) uint8; normalised inside the encoder. I may be 0.
        input_ids: (B, S); positions of visual tokens hold the image placeholder id.
        labels: (B, S), already aligned with ``input_ids`` (not shifted); -100 where unsupervised.
        layout: what each position is.
        images: where every image belongs.
        sample_ids: the samples of every row (several when packed).
        text_ids: (I, T) what the user says to each image in the tokens of the encoder's text tower, -1 after the last;
            None where nothing reads it.
        texts: (B) the words of every row of pairs of images and texts; empty in other batches.
    """

    pixels: Tensor
    input_ids: Tensor
    labels: Tensor
    layout: Layout
    images: Images
    sample_ids: list[list[str]]
    text_ids: Tensor | None = None
    texts: tuple[str, ...] = ()

    @property
    def supervised(self) -> int:
        """Number of supervised tokens: what the language-model loss divides by."""
        return int((self.labels[:, 1:] != -100).sum())

    def instructions(self) -> Tensor:
        """(I, T) token ids of what the user says to each image, -1 after the last; T is at least 1.

        An image's instruction is the text of role user in its own turn: in the same packed sample, with as many answer
        tokens before it. So it never holds an answer or a later turn, and is the same in training and in generation.
        A plain prompt has none. Of a tree it would be all questions: a composition that reads it is given no trees.
        """
        row, place = self.images.row, self._places()
        layout, era = self.layout, self.layout.era
        user = (layout.kind == Kind.TEXT) & (layout.role == Role.USER)  # (B, S)
        own = user[row] & (layout.segment[row] == self.images.segment[:, None])  # (I, S)
        return self._listed(row, own & (era[row] == era[row, place][:, None]))

    def captions(self) -> Tensor:
        """(I, T) supervised token ids of each image's packed sample, -1 after the last: for objectives only."""
        row = self.images.row
        same = self.layout.segment[row] == self.images.segment[:, None]  # (I, S)
        return self._listed(row, same & (self.labels != -100)[row])

    def image_samples(self) -> Tensor:
        """(I,) number of each image's packed sample, over all rows; images of one sample have the same."""
        return self.images.row * self.layout.kind.shape[1] + self.images.segment

    def _places(self) -> Tensor:
        """(I,) a position of each image's own turn: its place, or the last one where its row ends with it."""
        return self.images.place.clamp(max=self.layout.kind.shape[1] - 1)

    def _listed(self, row: Tensor, own: Tensor) -> Tensor:
        """(I, T) ids at the chosen positions (I, S) of these rows (I,), in their order, -1 after the last."""
        length = max(int(own.sum(1).max()), 1) if len(row) else 1
        order = (~own).long().argsort(dim=1, stable=True)[:, :length]  # (I, T) the chosen ones first
        return self.input_ids[row].gather(1, order).masked_fill(~own.gather(1, order), -1)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            pixels=self.pixels.to(device),
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            layout=self.layout.to(device),
            images=self.images.to(device),
            text_ids=None if self.text_ids is None else self.text_ids.to(device),
        )


@dataclass(frozen=True)
class Textual:
    """What the text tower of a pair returns.

    Attributes:
        states: (B, T, Dt) of every position, padding as well.
        pooled: (B, Wt) the whole text in one vector.
        valid: (B, T) bool: positions that hold a token of the text.
    """

    states: Tensor
    pooled: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Pairing:
    """Image and text embeddings of a dual encoder, with SigLIP's learned temperature and bias.

    Attributes:
        image, text: (B, E), of unit length, row i of both from the same sample.
        log_scale, bias: scalars; the similarity of a pair is exp(log_scale) * <image, text> + bias.
    """

    image: Tensor
    text: Tensor
    log_scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Outputs:
    """What the model returns to the objectives.

    Attributes:
        logits: (T, V) at the positions that predict a supervised token, in row-major order.
        targets: (T,) the token each of them should predict.
        seen: what the encoder and the connector gave.
        states: (B, S, D) the LM's last hidden states, or None where it did not read the whole batch.
        embeds: (B, S, D) what entered the LM, or None likewise.
        pairing: the embeddings of a dual encoder, or None.
        textual: what the text tower of a pair returned for the row's own text, or None.
        memories: by key what blocks in the LM's layers read, with what they noted.
    """

    logits: Tensor
    targets: Tensor
    seen: Seen = field(default_factory=Seen)
    states: Tensor | None = None
    embeds: Tensor | None = None
    pairing: Pairing | None = None
    textual: Textual | None = None
    memories: Mapping[str, Memory] = field(default_factory=dict)

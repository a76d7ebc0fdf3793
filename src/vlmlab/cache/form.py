"""How the features of one image are written down: the bytes of its tensors one after the other, always as many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmlab.cache.address import tensors
from vlmlab.contracts.tensors import Visual

ALIGNMENT = 16
"""Records and the tensors in them begin at multiples of so many bytes, so that they can be read in place."""


@dataclass(frozen=True)
class Field:
    """One tensor of a record.

    Attributes:
        shape: of one image.
        dtype: as the encoder returns it.
        stored: as it is written.
        start, end: its bytes in the record.
    """

    shape: torch.Size
    dtype: torch.dtype
    stored: torch.dtype
    start: int
    end: int


@dataclass(frozen=True)
class Form:
    """The record of one image: the size of its grid, its feature grids, its pooled feature where there is one.

    Attributes:
        fields: in the order of ``vlmlab.cache.address.tensors``.
        grids: number of feature grids.
        length: bytes of a record.
    """

    fields: tuple[Field, ...]
    grids: int
    length: int

    @classmethod
    def of(cls, answer: Visual, rounded: torch.dtype | None) -> Form:
        """The form of an encoder that answered this for one image; `rounded`: type of stored features."""
        fields: list[Field] = []
        start = 0
        for tensor in tensors(answer):
            stored = rounded if rounded is not None and tensor.is_floating_point() else tensor.dtype
            shape = tensor.shape[1:]
            end = start + shape.numel() * stored.itemsize
            fields.append(Field(shape, tensor.dtype, stored, start, end))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), len(answer.grids), start)

    def described(self) -> list[list[str]]:
        """Shape, type and stored type of every tensor in words."""
        return [[str(list(field.shape)), str(field.dtype), str(field.stored)] for field in self.fields]

    def pack(self, visual: Visual) -> Tensor:
        """Features of one image -> (L,) uint8 on the CPU."""
        record = torch.zeros(self.length, dtype=torch.uint8)
        for field, tensor in zip(self.fields, tensors(visual), strict=True):
            flat = tensor.detach().to("cpu", field.stored).reshape(-1)
            record[field.start : field.end] = flat.view(torch.uint8)
        return record

    def unpack(self, records: Tensor, device: torch.device) -> Visual:
        """(I, L) uint8 -> features of I images on a device."""
        found = []
        for field in self.fields:
            values = records[:, field.start : field.end].view(field.stored)  # (I, numbers)
            found.append(values.to(device, field.dtype).reshape(-1, *field.shape).contiguous())
        hw, grids, rest = found[0], found[1 : 1 + self.grids], found[1 + self.grids :]
        return Visual(grids=grids, pooled=rest[0] if rest else None, hw=hw)

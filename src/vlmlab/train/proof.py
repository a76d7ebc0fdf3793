"""Proof that frozen weights stayed and trained ones moved: exact fingerprints, computed where the tensors are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 22
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Fingerprint = tuple[int, int]


def fingerprint(tensor: Tensor) -> Tensor:
    """Two int64 sums modulo 2**64 over the tensor's bits, plain and weighted by place: equal for equal tensors.

    A single changed value always changes the first; values that trade places change the second.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.to(torch.int8) if flat.dtype == torch.bool else flat.view(INTEGERS[flat.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=flat.device) % 65521 + 1
        sums += torch.stack([part.sum(), (part * place).sum()])
    return sums


def fingerprints(named: Iterable[tuple[str, Tensor]]) -> dict[str, Fingerprint]:
    """The fingerprint of every tensor, by name."""
    waiting = [(name, fingerprint(tensor)) for name, tensor in named]  # read only when all are under way
    return {name: (int(sums[0]), int(sums[1])) for name, sums in waiting}


def changed(before: Mapping[str, Fingerprint], after: Mapping[str, Fingerprint]) -> list[str]:
    """Names whose fingerprints differ."""
    return [name for name, value in before.items() if name in after and tuple(after[name]) != tuple(value)]

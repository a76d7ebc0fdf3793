"""Proof that frozen weights stayed and trained ones moved: a digest of the bits of every tensor before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vlmlab.recipe.shards import whole


def fingerprint(tensor: Tensor) -> str:
    """32 hexadecimal digits of the tensor's bits (blake2b), the same on every device and from all of its shards."""
    flat = whole(tensor.detach()).cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def fingerprints(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The fingerprint of every tensor, by name."""
    return {name: fingerprint(tensor) for name, tensor in named}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names in both whose fingerprints differ."""
    return [name for name, value in before.items() if name in after and after[name] != value]

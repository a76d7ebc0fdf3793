"""Proof that frozen weights stayed and trained ones moved: a digest of the bits of every tensor before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from vlmlab.digest import fingerprint
from vlmlab.engine.shards import whole


def fingerprints(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The fingerprint of every tensor, by name; of all its shards where it is one of several."""
    return {name: fingerprint(whole(tensor.detach())) for name, tensor in named}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names in both whose fingerprints differ."""
    return [name for name, value in before.items() if name in after and after[name] != value]

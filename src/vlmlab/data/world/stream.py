"""A random stream that is the same on every machine and for every version of Python and numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from struct import unpack
from typing import TypeVar

T = TypeVar("T")
_CHUNK = 64


class Stream:
    """Random choices derived from a key by SHAKE-128, whose bytes are fixed by FIPS 202.

    numpy fixes its bit generators but not what its distributions do with them, and building one costs three times as
    much; an extendable hash is both the stable seed and the stream.

    Args:
        key: anything whose ``str`` is stable; two streams are equal if and only if their keys are.
    """

    __slots__ = ("_chunk", "_key", "_values")

    def __init__(self, *key: object) -> None:
        self._key = "/".join(map(str, key))
        self._chunk = 0
        self._values: list[int] = []

    def _next(self) -> int:
        if not self._values:
            name = f"{self._key}#{self._chunk}".encode()
            self._values = list(unpack(f"<{_CHUNK}Q", hashlib.shake_128(name).digest(8 * _CHUNK)))
            self._chunk += 1
        return self._values.pop()

    def below(self, limit: int) -> int:
        """An integer in ``0 .. limit - 1``; the bias of the modulus is under 1e-17."""
        return self._next() % limit

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return (self._next() >> 11) < probability * (1 << 53)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each equally likely."""
        return items[self._next() % len(items)]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, with probability in proportion to its weight (at least one weight must be positive)."""
        sums = list(accumulate(weights))
        point = (self._next() >> 11) / (1 << 53) * sums[-1]
        for index, total in enumerate(sums):
            if point < total:
                return index
        return len(sums) - 1

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order (Fisher-Yates); the argument is left alone."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self._next() % (last + 1)
            out[last], out[other] = out[other], out[last]
        return out


def noise_bytes(size: int, *key: object) -> bytes:
    """``size`` random bytes derived from a key, for the pixel noise of an image."""
    return hashlib.shake_128("/".join(map(str, key)).encode()).digest(size)

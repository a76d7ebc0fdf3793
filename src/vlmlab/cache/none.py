"""``none``: the encoder looks at every image every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vlmlab.contracts.parts import Encoder, FeatureCache
from vlmlab.contracts.tensors import Visual


class NoCache(FeatureCache):
    """Keeps nothing."""

    keeps = False

    def __call__(self, encoder: Encoder, pixels: Tensor) -> Visual:
        """What the encoder sees."""
        return encoder(pixels)

    @contextmanager
    def serving(self, model: nn.Module, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """The model as it is; nothing to say."""
        yield {}

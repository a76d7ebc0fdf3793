"""``none``: no adapter; the parts train as they are."""

from __future__ import annotations

from torch import nn

from vlmlab.contracts.parts import Adapter


class NoAdapter(Adapter):
    """Wraps nothing."""

    parts = ()

    def wrap(self, part: nn.Module) -> nn.Module:
        """The part as it is."""
        return part

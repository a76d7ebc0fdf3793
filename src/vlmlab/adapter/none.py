"""``none``: no adapter; the parts train as they are."""

from __future__ import annotations

from transformers import PreTrainedModel


class NoAdapter:
    """Wraps nothing."""

    parts: tuple[str, ...] = ()
    lr: float | None = None

    def wrap(self, part: PreTrainedModel) -> PreTrainedModel:
        """The part as it is."""
        return part

"""``embedded``: the tiny SigLIP tower that ships with the package, trained on the embedded world."""

from __future__ import annotations

from collections.abc import Sequence

from vlmlab.encoder.hf import HfEncoder
from vlmlab.towers import embedded


class EmbeddedEncoder(HfEncoder):
    """The shipped vision tower, loaded through the same code as any real one.

    Args:
        layers, pooled, image_size, gradient_checkpointing: see ``HfEncoder``.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        pooled: bool = False,
        image_size: int | Sequence[int] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            path=str(embedded("vision")),
            layers=layers,
            pooled=pooled,
            image_size=image_size,
            gradient_checkpointing=gradient_checkpointing,
        )

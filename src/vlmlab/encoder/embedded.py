"""``embedded``: the tiny SigLIP tower that ships with the package, trained on the embedded world."""

from __future__ import annotations

from collections.abc import Sequence

from vlmlab.encoder.text import TransformersTextTower, open_text_tower
from vlmlab.encoder.tower import TowerEncoder, open_tower, sides
from vlmlab.towers.source import embedded


class EmbeddedEncoder(TowerEncoder):
    """The shipped vision tower, loaded through the same code as any real one.

    Args:
        layers, pooled, gradient_checkpointing: see ``TowerEncoder``.
        image_size: pixels per side, or [height, width], that images are brought to; null: its own.
    """

    has_text = True

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        pooled: bool = False,
        image_size: int | Sequence[int] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        tower, preprocess, source = open_tower(str(embedded("vision")), "float32")
        if image_size is not None:
            preprocess = preprocess.at(*sides(image_size))
        super().__init__(tower, preprocess, layers, pooled, source, gradient_checkpointing)

    def text_tower(self) -> TransformersTextTower:
        """The shipped text tower, trained against the shipped vision tower as that is."""
        return open_text_tower(str(embedded("text")), "float32")

"""``embedded``, ``embedded_siglip``: the tiny SigLIP towers that ship with the package, made on its own world."""

from __future__ import annotations

from vlmlab.contracts.values import Layers, Size, Text
from vlmlab.encoder.families import sides
from vlmlab.encoder.text import TransformersTextTower, open_text_tower
from vlmlab.encoder.tower import TowerEncoder, open_tower
from vlmlab.towers.source import embedded


class EmbeddedEncoder(TowerEncoder):
    """A shipped vision tower, loaded through the same code as any real one.

    Args:
        pair: "demo" was taught what is in each cell of the world, so that it answers fast and decides beforehand what
            connects best; "testbed" saw whole captions alone.
        layers, pooled, gradient_checkpointing: see ``TowerEncoder``.
        image_size: pixels per side, or [height, width], that images are brought to; null: its own.
    """

    has_text = True

    def __init__(
        self,
        layers: Layers | None = None,
        pooled: bool = False,
        image_size: Size | None = None,
        gradient_checkpointing: bool = False,
        pair: Text = "demo",
    ) -> None:
        tower, preprocess, source = open_tower(str(embedded("vision", pair)), "float32")
        if image_size is not None:
            preprocess = preprocess.at(*sides(image_size))
        super().__init__(tower, preprocess, layers, pooled, source, gradient_checkpointing)
        self.pair = pair

    def text_tower(self) -> TransformersTextTower:
        """The text tower that was trained with the vision tower, or for it as it is."""
        return open_text_tower(str(embedded("text", self.pair)), "float32")

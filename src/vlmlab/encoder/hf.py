"""``hf``: any transformers vision tower, by local folder or hub id."""

from __future__ import annotations

from dataclasses import replace

from vlmlab.contracts.values import Architecture, Dtype, Layers, Size, Text
from vlmlab.encoder.families import sides
from vlmlab.encoder.text import TransformersTextTower, open_text_tower
from vlmlab.encoder.tower import TowerEncoder, open_tower


class HfEncoder(TowerEncoder):
    """A transformers vision tower whose patch features are tapped at chosen layers.

    Args:
        path: local folder or hub id of a tower, or of a two-tower checkpoint whose vision half is taken.
        layers: indices into the tower's hidden states (-2 is the last but one, as in LLaVA); null is the
            tower's final output after its last norm. Layers after the last one tapped are cut off.
        pooled: keep the tower's pooling head and return its output (contrastive training needs it).
        dtype: dtype of the weights; trainable weights stay float32.
        image_size: pixels per side, or [height, width], that images are brought to; null: what the tower's
            preprocessor file says. At another size than it was trained on, its positions are interpolated.
        square: pad images to squares in the mean colour first, as LLaVA-1.5 does, so that no margin is cut off.
        gradient_checkpointing: recompute the activations of layers that train in the backward pass.
        class_token: keep the tokens that are before the patches (class, registers), as BLIP-2's Q-Former reads them;
            the features then form one row and no grid.
        architecture: what the config.json of a hub id says; read only on the meta device (``vlmlab.towers.blueprint``).

    Raises:
        UserError: the path is neither a folder nor reachable, the family is unknown, or a layer does not exist.
    """

    has_text = True

    def __init__(
        self,
        path: Text,
        layers: Layers | None = None,
        pooled: bool = False,
        dtype: Dtype = "float32",
        image_size: Size | None = None,
        square: bool = False,
        gradient_checkpointing: bool = False,
        class_token: bool = False,
        architecture: Architecture | None = None,
    ) -> None:
        self._opened = path, dtype, architecture  # private: where it came from is not what it sees
        tower, preprocess, source = open_tower(path, dtype, architecture, pooled)
        if image_size is not None:
            preprocess = preprocess.at(*sides(image_size))
        preprocess = replace(preprocess, square=square)
        super().__init__(tower, preprocess, layers, pooled, source, gradient_checkpointing, class_token)

    def text_tower(self) -> TransformersTextTower:
        """The text half of the same checkpoint, a module of its own: none of it is the encoder's."""
        return open_text_tower(*self._opened)

"""``scratch``: a SigLIP vision tower with random weights; what ``recipe=embedded_towers`` starts from."""

from __future__ import annotations

from functools import partial

from transformers import SiglipVisionConfig, SiglipVisionModel

from vlmlab.contracts.room import check_room
from vlmlab.contracts.values import Depth, Layers, Pixels, Width
from vlmlab.encoder.preprocess import Preprocess
from vlmlab.encoder.tower import TowerEncoder


class ScratchEncoder(TowerEncoder):
    """A randomly initialised SigLIP vision tower (arXiv 2303.15343 for the family; sizes are ours).

    Args:
        image_size: pixels per side.
        patch_size: pixels per side of a patch; the tower returns (image_size / patch_size)^2 features.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in ``SiglipVisionConfig``.
        layers, pooled: see ``TowerEncoder``.
    """

    def __init__(
        self,
        image_size: Pixels,
        patch_size: Pixels,
        hidden_size: Width,
        intermediate_size: Width,
        num_hidden_layers: Depth,
        num_attention_heads: Width,
        layers: Layers | None = None,
        pooled: bool = False,
    ) -> None:
        config = SiglipVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
        )
        check_room("encoder", config.to_dict(), partial(SiglipVisionModel, config))
        super().__init__(SiglipVisionModel(config), Preprocess(image_size, image_size), layers, pooled)

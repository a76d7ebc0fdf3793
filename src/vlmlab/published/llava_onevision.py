"""LLaVA-OneVision (arXiv 2408.03326) with every image as one tile, as it reads several images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from vlmlab.model.vlm import VLM
from vlmlab.published.base import Keys, only
from vlmlab.published.llava import Llava


class LlavaOnevision(Llava):
    """``LlavaOnevisionForConditionalGeneration``; the tiles of a single image are not reproduced, nor videos."""

    model = LlavaOnevisionForConditionalGeneration
    tiled = True

    def keys(self, config: Any) -> Keys:
        """LLaVA's, and the learned vector after every image."""
        only(config, "its projector", projector_hidden_act="gelu")
        return {**super().keys(config), "connector.end": True}

    def lacks(self, model: VLM) -> str | None:
        """It is taken apart alone: its processor cuts tiles of a single image."""
        return "cuts images into tiles"

    def connector(self, model: Any) -> Mapping[str, Tensor]:
        """LLaVA's two layers and that vector."""
        return {**super().connector(model), "end": model.model.image_newline}

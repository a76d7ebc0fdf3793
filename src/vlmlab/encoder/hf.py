"""``hf``: any transformers vision tower, by local folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel, Dinov2Model, PreTrainedModel, SiglipVisionModel

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.tensors import Visual
from vlmlab.encoder.preprocess import Preprocess, read_preprocess
from vlmlab.towers import quiet, resolve, tower_hash

BEHIND_FINAL: dict[type[nn.Module], tuple[str, ...]] = {
    SiglipVisionModel: ("head",),
    CLIPVisionModel: ("post_layernorm",),
    Dinov2Model: (),
}
"""Children that the tower's final patch features do not depend on."""

BEHIND_TAP: dict[type[nn.Module], tuple[str, ...]] = {
    SiglipVisionModel: ("post_layernorm", "head"),
    CLIPVisionModel: ("post_layernorm",),
    Dinov2Model: ("layernorm",),
}
"""Children that a hidden state does not depend on."""


class HfEncoder(Encoder):
    """A transformers vision tower whose patch features are tapped at chosen layers.

    Args:
        path: local folder or hub id of a tower, or of a two-tower checkpoint whose vision half is taken.
        layers: indices into the tower's hidden states (-2 is the last but one, as in LLaVA); null is the
            tower's final output after its last norm. Layers behind the last one tapped are cut off.
        pooled: keep the tower's pooling head and return its output (contrastive training needs it).
        dtype: dtype of the weights; trainable weights stay float32.

    Raises:
        UserError: the path is neither a folder nor reachable, the family is unknown, or a layer does not exist.
    """

    def __init__(
        self, path: str, layers: Sequence[int] | None = None, pooled: bool = False, dtype: str = "float32"
    ) -> None:
        super().__init__()
        folder = resolve(path, "encoder.path")
        self.source: str | None = tower_hash(folder)
        self._setup(_load_tower(folder, dtype), read_preprocess(folder), layers, pooled)

    def _setup(
        self, tower: PreTrainedModel, preprocess: Preprocess, layers: Sequence[int] | None, pooled: bool
    ) -> None:
        if type(tower) not in BEHIND_TAP:
            names = ", ".join(kind.__name__ for kind in BEHIND_TAP)
            raise UserError(f"encoder: {type(tower).__name__} is not a known vision tower; known are {names}.")
        if pooled and layers is not None:
            raise UserError("encoder.pooled=true needs encoder.layers=null: a pooled output follows the last layer.")
        self.tower = tower
        self.preprocess = preprocess
        self.pooled = pooled
        depth = int(tower.config.num_hidden_layers)
        self.layers = None if layers is None else _absolute(layers, depth)
        if not pooled:
            _cut(tower, depth if self.layers is None else max(self.layers), tapped=self.layers is not None)
        self.width = int(tower.config.hidden_size) * (1 if self.layers is None else len(self.layers))
        self.pooled_width = int(tower.config.hidden_size)
        self.patch = int(tower.config.patch_size)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (preprocess.mean, preprocess.std))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid of one image."""
        return self.preprocess.height // self.patch, self.preprocess.width // self.patch

    def forward(self, pixels: Tensor) -> Visual:
        """(I, 3, H, W) uint8 -> Visual with one (I, N, Dv) grid per layer; class and register tokens dropped."""
        dtype = next(self.tower.parameters()).dtype
        values = ((pixels.float() - self.mean) / self.std).to(dtype)
        out = self.tower(pixel_values=values, output_hidden_states=self.layers is not None)
        final = (out.last_hidden_state,)
        # a tower cut down to its embedding reports no hidden states: its output is that embedding
        taken = final if self.layers is None else [(out.hidden_states or final)[i] for i in self.layers]
        rows, columns = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        # class and register tokens, where a family has them, come before the patches
        grids = [grid[:, grid.shape[1] - rows * columns :] for grid in taken]  # each (I, N, Dv)
        hw = torch.tensor([[rows, columns]], device=pixels.device).expand(pixels.shape[0], 2)
        return Visual(grids=grids, pooled=out.pooler_output if self.pooled else None, hw=hw)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters that the features depend on (Dinov2's mask token serves only its pre-training)."""
        unused = {id(p) for n, p in self.named_parameters() if n == "tower.embeddings.mask_token"}
        return [(n, p) for n, p in self.named_parameters() if id(p) not in unused]


def _load_tower(folder: Path, dtype: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    vision = getattr(config, "vision_config", config)
    tower_class: type[PreTrainedModel] = AutoModel._model_mapping[type(vision)]  # type: ignore[assignment]
    with quiet():
        loaded: Any = tower_class.from_pretrained(
            folder, config=vision, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
    tower, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{folder} lacks weights of {tower_class.__name__} ({missing}, ...); check encoder.path.")
    return tower


def _absolute(layers: Sequence[int], depth: int) -> list[int]:
    """Indices into ``hidden_states`` (0 is the embedding, `depth` the last layer's output) as non-negative numbers."""
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise UserError(f"encoder.layers has {layer}, but the tower has {depth} layers; use {-depth - 1}..{depth}.")
    return [layer % (depth + 1) for layer in layers]


def _cut(tower: PreTrainedModel, depth: int, tapped: bool) -> None:
    """Removes the layers, the last norm and the pooling head that no tapped feature depends on."""
    stack = "layers" if hasattr(tower.encoder, "layers") else "layer"
    setattr(tower.encoder, stack, getattr(tower.encoder, stack)[:depth])
    for name in (BEHIND_TAP if tapped else BEHIND_FINAL)[type(tower)]:
        if hasattr(tower, name):  # SigLIP may have been saved without a head
            setattr(tower, name, nn.Identity())

"""A transformers vision tower as an encoder: what the plug-ins of this folder that hold one share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.utils import logging

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Architecture
from vlmlab.encoder.preprocess import Preprocess, read_preprocess
from vlmlab.towers.blueprint import SAFE, open_config, read_config, readable, weightless
from vlmlab.towers.source import quiet, resolve, tower_hash

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

ONE_SIZE = (SiglipVisionModel, CLIPVisionModel)
"""Towers that must be told to interpolate their positions for images of another size; Dinov2 always does."""


class TowerEncoder(Encoder):
    """A transformers vision tower whose patch features are tapped at chosen layers.

    Args:
        tower: the tower; layers behind the last one tapped are cut off it.
        preprocess: how an image becomes pixels.
        layers: indices into the tower's hidden states (-2 is the last but one, as in LLaVA); None is the tower's final
            output after its last norm.
        pooled: keep the tower's pooling head and return its output (contrastive training needs it).
        source: hash of the weights that were loaded, None where there are none.
        gradient_checkpointing: recompute the activations of layers that train in the backward pass.

    Raises:
        UserError: the family is unknown, a layer does not exist, or an image is smaller than a patch.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        preprocess: Preprocess,
        layers: Sequence[int] | None = None,
        pooled: bool = False,
        source: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if type(tower) not in BEHIND_TAP:
            names = ", ".join(kind.__name__ for kind in BEHIND_TAP)
            raise UserError(f"encoder: {type(tower).__name__} is not a known vision tower; known are {names}.")
        if pooled and layers is not None:
            raise UserError("encoder.pooled=true needs encoder.layers=null: a pooled output follows the last layer.")
        self.source = source
        self.tower = tower
        self.preprocess = preprocess
        self.white = preprocess.white
        self.pooled = pooled
        depth = int(tower.config.num_hidden_layers)
        self.layers = None if layers is None else _absolute(layers, depth)
        if not pooled:
            _cut(tower, depth if self.layers is None else max(self.layers), tapped=self.layers is not None)
        self.width = int(tower.config.hidden_size) * (1 if self.layers is None else len(self.layers))
        self.pooled_width = int(tower.config.hidden_size)
        self.patch = int(tower.config.patch_size)
        if min(preprocess.height, preprocess.width) < self.patch:
            raise UserError(
                f"encoder.image_size={preprocess.height}x{preprocess.width} has no room for a patch of {self.patch} "
                f"pixels; give at least {self.patch}."
            )
        own = sides(tower.config.image_size)
        self.interpolate = isinstance(tower, ONE_SIZE) and own != (preprocess.height, preprocess.width)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if gradient_checkpointing:
            tower.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid of one image."""
        return self.preprocess.height // self.patch, self.preprocess.width // self.patch

    @property
    def widths(self) -> list[int]:
        """The tower's own for every layer."""
        count = 1 if self.layers is None else len(self.layers)
        return [self.width // count] * count

    def forward(self, pixels: Tensor) -> Visual:
        """(I, 3, H, W) uint8 -> Visual with one (I, N, Dv) grid per layer; class and register tokens dropped."""
        dtype = next(self.tower.parameters()).dtype
        # in transformers' order of operations, so that the values are its processor's to the last bit
        values = ((pixels.float() / self.white - self.mean) / self.std).to(dtype)
        options = {"interpolate_pos_encoding": True} if self.interpolate else {}
        out = self.tower(pixel_values=values, output_hidden_states=self.layers is not None, **options)
        final = (out.last_hidden_state,)
        # a tower cut down to its embedding reports no hidden states: its output is that embedding
        taken = final if self.layers is None else [(out.hidden_states or final)[i] for i in self.layers]
        rows, columns = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        # class and register tokens, where a family has them, come before the patches
        grids = [grid[:, grid.shape[1] - rows * columns :] for grid in taken]  # each (I, N, Dv)
        pooled = out.pooler_output if self.pooled else None
        if dtype.itemsize < 4 and not autocast(pixels.device):  # a frozen tower in half precision, all else in single
            grids, pooled = [grid.float() for grid in grids], None if pooled is None else pooled.float()
        hw = torch.tensor([[rows, columns]], device=pixels.device).expand(pixels.shape[0], 2)
        return Visual(grids=grids, pooled=pooled, hw=hw)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters that the features depend on (Dinov2's mask token serves only its pre-training)."""
        unused = {id(p) for n, p in self.named_parameters() if n == "tower.embeddings.mask_token"}
        return [(n, p) for n, p in self.named_parameters() if id(p) not in unused]


def open_tower(
    path: str, dtype: str, architecture: Architecture | None = None
) -> tuple[PreTrainedModel, Preprocess, str | None]:
    """A tower, its preprocessing and the hash of its weights, from a local folder or a hub id.

    On the meta device (``vlmlab.towers.blueprint``) it has no values and no hash.
    """
    if weightless():
        return *_empty_tower(path, dtype, architecture), None
    folder = resolve(path, "encoder.path")
    vision, tower_class = _kind(open_config(folder, path, "encoder.path"))
    return load_tower(tower_class, vision, folder, dtype), read_preprocess(folder), tower_hash(folder)


def _kind(config: PreTrainedConfig) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config and class of a tower, or of the vision half of a two-tower checkpoint."""
    vision = getattr(config, "vision_config", config)
    tower_class: type[PreTrainedModel] = AutoModel._model_mapping[type(vision)]  # type: ignore[assignment]
    return vision, tower_class


def _empty_tower(path: str, dtype: str, architecture: Architecture | None) -> tuple[PreTrainedModel, Preprocess]:
    """A tower without values; without a preprocessor file at hand it takes the size it was trained on."""
    vision, tower_class = _kind(read_config(path, architecture, "encoder.path"))
    folder = Path(path).expanduser()
    preprocess = read_preprocess(folder) if folder.is_dir() else Preprocess(*sides(vision.image_size))
    make: Any = tower_class._from_config
    return make(vision, dtype=getattr(torch, dtype), attn_implementation="sdpa"), preprocess


def load_tower(
    tower_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, dtype: str
) -> PreTrainedModel:
    """A tower, or one half of a two-tower checkpoint, with all of its weights.

    Raises:
        UserError: some are missing.
    """
    with quiet(), _unreported(), readable("weights", folder, str(folder), "encoder.path"):
        loaded: Any = tower_class.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
            **SAFE,
        )
    tower, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{folder} lacks weights of {tower_class.__name__} ({missing}, ...); check encoder.path.")
    return tower


@contextmanager
def _unreported() -> Iterator[None]:
    """Keeps transformers from listing every weight of the other half; what is missing is looked at by `load_tower`."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def autocast(device: torch.device) -> bool:
    """Whether mixed precision is on; the meta device has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


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

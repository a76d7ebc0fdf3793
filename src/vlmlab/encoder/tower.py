"""A transformers vision tower as an encoder: what the plug-ins of this folder that hold one share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Architecture
from vlmlab.encoder.families import attention_of, cut, family, patch_of, reading, sides, tapped
from vlmlab.encoder.preprocess import Preprocess, read_preprocess
from vlmlab.towers.blueprint import SAFE, open_config, read_config, readable, weightless
from vlmlab.towers.source import quiet, resolve, tower_hash


class TowerEncoder(Encoder):
    """A transformers vision tower whose patch features are tapped at chosen layers.

    Args:
        tower: the tower; layers after the last one tapped are cut off it.
        preprocess: how an image becomes pixels.
        layers: indices into the tower's hidden states (-2 is the last but one, as in LLaVA); None is the tower's final
            output after its last norm.
        pooled: keep the tower's pooling head and return its output (contrastive training needs it).
        source: hash of the weights that were loaded, None where there are none.
        gradient_checkpointing: recompute the activations of layers that train in the backward pass.
        class_token: keep the tokens that are before the patches (class, registers); the features then form one row.

    Raises:
        UserError: it gives no grid of patches, a layer does not exist, an image is smaller than a patch, or the family
            recomputes nothing.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        preprocess: Preprocess,
        layers: Sequence[int] | None = None,
        pooled: bool = False,
        source: str | None = None,
        gradient_checkpointing: bool = False,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        if pooled and layers is not None:
            raise UserError("encoder.pooled=true needs encoder.layers=null: a pooled output follows the last layer.")
        self.source = source
        self.tower = tower
        self.preprocess = preprocess
        self.white = preprocess.white
        self.pooled = pooled
        depth = int(tower.config.num_hidden_layers)
        self.layers = None if layers is None else _absolute(layers, depth)
        self.width = int(tower.config.hidden_size) * (1 if self.layers is None else len(self.layers))
        self.pooled_width = int(tower.config.hidden_size)
        self.patch = patch_of(tower.config)
        if min(preprocess.height, preprocess.width) < self.patch:
            raise UserError(
                f"encoder.image_size={preprocess.height}x{preprocess.width} has no room for a patch of {self.patch} "
                f"pixels; give at least {self.patch}."
            )
        self._reading = reading(tower, (preprocess.height, preprocess.width), self.layers, pooled)
        self.class_token = class_token
        if not pooled:
            cut(tower, depth if self.layers is None else max(self.layers), tapped=self.layers is not None)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if gradient_checkpointing:
            if not tower.supports_gradient_checkpointing:
                raise UserError(f"encoder.gradient_checkpointing=true: {type(tower).__name__} cannot; set it to false.")
            tower.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid of one image; one row of all where class tokens are kept."""
        return self._shape(self.preprocess.height, self.preprocess.width)

    @property
    def special(self) -> int:
        """Tokens that the tower has before its patches (class, registers)."""
        return self._reading.special

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = height // self.patch, width // self.patch
        kept = self._reading.special if self.class_token else 0
        return (1, kept + rows * columns) if kept else (rows, columns)

    @property
    def widths(self) -> list[int]:
        """The tower's own for every layer."""
        count = 1 if self.layers is None else len(self.layers)
        return [self.width // count] * count

    def forward(self, pixels: Tensor) -> Visual:
        """(I, 3, H, W) uint8 -> Visual with one (I, N, Dv) grid per layer; class and register tokens where kept."""
        dtype = next(self.tower.parameters()).dtype
        # in transformers' order of operations, so that the values are its processor's to the last bit
        values = ((pixels.float() / self.white - self.mean) / self.std).to(dtype)
        out = self.tower(pixel_values=values, output_hidden_states=self.layers is not None, **self._reading.options)
        rows, columns = self._shape(pixels.shape[2], pixels.shape[3])
        # class and register tokens, where a family has them, come before the patches
        grids = [grid[:, grid.shape[1] - rows * columns :] for grid in tapped(out, self.layers)]  # each (I, N, Dv)
        pooled = out.pooler_output if self.pooled else None
        if dtype.itemsize < 4 and not autocast(pixels.device):  # a frozen tower in half precision, all else in single
            grids, pooled = [grid.float() for grid in grids], None if pooled is None else pooled.float()
        hw = torch.tensor([[rows, columns]], device=pixels.device).expand(pixels.shape[0], 2)
        return Visual(grids=grids, pooled=pooled, hw=hw)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters that the features depend on (a mask token serves only the pre-training)."""
        return [(n, p) for n, p in self.named_parameters() if n.removeprefix("tower.") not in self._reading.unused]


def open_tower(
    path: str, dtype: str, architecture: Architecture | None = None, pooled: bool = True
) -> tuple[PreTrainedModel, Preprocess, str | None]:
    """A tower, its preprocessing and the hash of its weights, from a local folder or a hub id.

    On the meta device (``vlmlab.towers.blueprint``) it has no values and no hash. Weights that serve its pooled output
    alone may be missing where that is not wanted (`pooled`).
    """
    if weightless():
        return *_empty_tower(path, dtype, architecture), None
    folder = resolve(path, "encoder.path")
    vision, tower_class = family(open_config(folder, path, "encoder.path"), path)
    return load_tower(tower_class, vision, folder, dtype, pooled), read_preprocess(folder), tower_hash(folder)


def _empty_tower(path: str, dtype: str, architecture: Architecture | None) -> tuple[PreTrainedModel, Preprocess]:
    """A tower without values; without a preprocessor file at hand it takes the size it was trained on."""
    vision, tower_class = family(read_config(path, architecture, "encoder.path"), path)
    folder = Path(path).expanduser()
    preprocess = read_preprocess(folder) if folder.is_dir() else Preprocess(*sides(vision.image_size))
    make: Any = tower_class._from_config
    return make(vision, dtype=getattr(torch, dtype), attn_implementation=attention_of(tower_class)), preprocess


def load_tower(
    tower_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, dtype: str, pooled: bool = True
) -> PreTrainedModel:
    """A tower, or one half of a two-tower checkpoint, with all of its weights, or those for its features.

    Raises:
        UserError: some are missing.
    """
    with quiet(), _unreported(), readable("weights", folder, str(folder), "encoder.path"):
        loaded: Any = tower_class.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention_of(tower_class),
            output_loading_info=True,
            **SAFE,
        )
    tower, info = loaded
    lacking = set(info["missing_keys"])
    if lacking and not pooled:
        lacking -= reading(tower, sides(config.image_size), None, pooled=False).unused
    if lacking:
        missing = ", ".join(sorted(lacking)[:3])
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


def autocast(device: torch.device) -> bool:
    """Whether mixed precision is on; the meta device has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _absolute(layers: Sequence[int], depth: int) -> list[int]:
    """Indices into ``hidden_states`` (0 is the embedding, `depth` the last layer's output) as non-negative numbers."""
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise UserError(f"encoder.layers has {layer}, but the tower has {depth} layers; use {-depth - 1}..{depth}.")
    return [layer % (depth + 1) for layer in layers]

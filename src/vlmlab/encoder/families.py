"""What is found out about a transformers vision tower of any family: its class, its layers, what its features use."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, Dinov2Model, PreTrainedConfig, PreTrainedModel, SiglipVisionModel
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from vlmlab.contracts.errors import UserError, reason

BEHIND_FINAL: dict[type[nn.Module], tuple[str, ...]] = {
    SiglipVisionModel: ("head",),
    CLIPVisionModel: ("post_layernorm",),
    Dinov2Model: (),
    Idefics2VisionTransformer: (),
}
"""Children that the tower's final patch features do not depend on, of the families that lose them."""

BEHIND_TAP: dict[type[nn.Module], tuple[str, ...]] = {
    SiglipVisionModel: ("post_layernorm", "head"),
    CLIPVisionModel: ("post_layernorm",),
    Dinov2Model: ("layernorm",),
    Idefics2VisionTransformer: ("post_layernorm",),
}
"""Children that a hidden state does not depend on."""

PATCHES_ALONE = (SiglipVisionModel, Idefics2VisionTransformer)
"""Those of these families without a token before the patches; the others have one."""

SIZES = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")


def family(config: PreTrainedConfig, path: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config and class of a tower, or of the vision half of a checkpoint that has one.

    Args:
        config: what the checkpoint's config.json says.
        path: where it came from, for messages.

    Raises:
        UserError: no vision tower, or one whose config does not say how large it and its patches are.
    """
    vision = getattr(config, "vision_config", config)
    kind = _class_of(vision)
    if kind is None or any(getattr(vision, name, None) is None for name in SIZES):
        raise UserError(
            f"encoder.path={path}: {type(vision).__name__} is not the config of a vision tower of equal patches and "
            "layers; give a ViT-like one, such as SigLIP, CLIP, DINOv2, DINOv3, ViT, EVA (of BLIP-2) or InternViT."
        )
    return vision, kind


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """AutoModel's, or the one model of the config's own module that takes pixels; None: there is none."""
    found: Any = AutoModel._model_mapping.get(type(config), None)
    if found is not None:
        return None if isinstance(found, tuple) else found
    name = type(config).__module__
    if not name.startswith("transformers."):
        return None
    module = importlib.import_module(name.replace("configuration_", "modeling_"))
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    fits = [kind for kind in own if getattr(kind, "config_class", None) is type(config) and _reads_pixels(kind)]
    return min(fits, key=lambda kind: len(kind.__name__), default=None)  # "...WithProjection" is longer


def _reads_pixels(kind: type[PreTrainedModel]) -> bool:
    return "forward" in vars(kind) and "pixel_values" in inspect.signature(kind.forward).parameters


def attention_of(kind: type[PreTrainedModel]) -> str:
    """Torch's fused attention, where the family has it."""
    return "sdpa" if kind._supports_sdpa else "eager"


def patch_of(config: PreTrainedConfig) -> int:
    """Pixels a side of a patch.

    Raises:
        UserError: patches that are not square.
    """
    size: Any = config.patch_size
    rows, columns = (size, size) if isinstance(size, int) else (size[0], size[-1])
    if rows != columns:
        raise UserError(f"encoder: patches of {rows}x{columns} pixels are not square; give a tower with square ones.")
    return int(rows)


def cut(tower: PreTrainedModel, depth: int, tapped: bool) -> None:
    """Removes the layers after `depth`, and of known families the norm and head that no tapped feature depends on."""
    owner, name = _stack(tower)
    setattr(owner, name, getattr(owner, name)[:depth])
    for child in (BEHIND_TAP if tapped else BEHIND_FINAL).get(type(tower), ()):
        if hasattr(tower, child):  # SigLIP may have been saved without a head
            setattr(tower, child, nn.Identity())


def _stack(tower: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that has the list of layers, and the list's name there."""
    depth = int(tower.config.num_hidden_layers)
    lists = [name for name, each in tower.named_modules() if isinstance(each, nn.ModuleList) and len(each) == depth]
    if len(lists) != 1:
        raise UserError(
            f"encoder: {type(tower).__name__} is not a known vision tower: it has {len(lists)} lists of {depth} layers."
        )
    owner, _, name = lists[0].rpartition(".")
    return tower.get_submodule(owner), name


@dataclass(frozen=True)
class Reading:
    """How a tower is called, and what its features come from.

    Attributes:
        options: keywords of its ``forward``.
        unused: names of weights that no tapped feature depends on.
        special: tokens that are before the patches (class, registers).
    """

    options: dict[str, bool]
    unused: frozenset[str]
    special: int


def reading(tower: PreTrainedModel, size: tuple[int, int], layers: Sequence[int] | None, pooled: bool) -> Reading:
    """Find that out on a twin without values, which is sent two blank images.

    Args:
        tower: the tower, before it is cut.
        size: height and width of the images that it will get.
        layers: indices of the tapped hidden states, not negative; None: its final output.
        pooled: whether its pooled output is wanted too.

    Raises:
        UserError: it cannot take such images, or does not give a grid of patches, or has no pooled output.
    """
    kind, known = type(tower), type(tower) in BEHIND_TAP
    own = sides(tower.config.image_size)
    takes = "interpolate_pos_encoding" in inspect.signature(kind.forward).parameters
    options = {"interpolate_pos_encoding": True} if takes and own != size else {}
    if known:
        unused = frozenset({"embeddings.mask_token"} if kind is Dinov2Model else ())
        return Reading(options, unused, 0 if kind in PATCHES_ALONE else 1)
    make: Any = kind._from_config
    with torch.device("meta"), torch.enable_grad():
        twin = make(tower.config, attn_implementation=attention_of(kind)).train(False)
        if not pooled:
            cut(twin, int(tower.config.num_hidden_layers) if layers is None else max(layers), layers is not None)
        try:
            out = twin(pixel_values=torch.zeros(2, 3, *size), output_hidden_states=layers is not None, **options)
            taken = tapped(out, layers)
        except Exception as error:  # whatever a family does with images that it cannot take
            told = f"encoder: {kind.__name__} does not take {size[0]}x{size[1]} pixels ({reason(error)})"
            raise UserError(f"{told}; set encoder.image_size=null, or use another tower.") from error
        special = taken[0].shape[1] - _check_grids(tower, taken, size)
        if pooled:
            if getattr(out, "pooler_output", None) is None:
                raise UserError(f"encoder.pooled=true: {kind.__name__} has no pooled output; set encoder.pooled=false.")
            taken = [*taken, out.pooler_output]
        sum(each.sum() for each in taken).backward()  # type: ignore[union-attr]
    return Reading(options, frozenset(name for name, p in twin.named_parameters() if p.grad is None), special)


def tapped(out: Any, layers: Sequence[int] | None) -> list[torch.Tensor]:
    """The hidden states (I, special + N, Dv) at these layers, or the final output.

    A tower cut down to its embedding reports no hidden states: its output is that embedding.
    """
    final = [out.last_hidden_state]
    return final if layers is None else [(out.hidden_states or final)[i] for i in layers]


def _check_grids(tower: PreTrainedModel, taken: Sequence[torch.Tensor], size: tuple[int, int]) -> int:
    """The number of patches.

    Raises:
        UserError: what was taken is not one such grid an image, with or without tokens before it.
    """
    patch = patch_of(tower.config)
    count, width = (size[0] // patch) * (size[1] // patch), int(tower.config.hidden_size)
    for grid in taken:
        if grid.ndim != 3 or len(grid) != 2 or grid.shape[1] < count or grid.shape[2] != width:
            raise UserError(
                f"encoder: {type(tower).__name__} gives {tuple(grid.shape)} of two images instead of (2, {count} or "
                f"more, {width}); it is not a tower of one grid of patches an image."
            )
    return count


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])

"""Towers of other families than those known by name: features, gradients, sizes, what is refused."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.encoder.test_hf import seen
from tests.tiny import root, siglip, spread, worst

from vlmlab.contracts.errors import UserError
from vlmlab.encoder.families import family
from vlmlab.encoder.hf import HfEncoder

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
FAMILIES = {  # config -> other sizes that its images may have
    "ViTConfig": True,
    "DeiTConfig": True,
    "BeitConfig": True,
    "Dinov2WithRegistersConfig": True,
    "DINOv3ViTConfig": True,
    "Blip2VisionConfig": True,  # EVA-CLIP's ViT-g
    "InstructBlipVisionConfig": True,
    "BlipVisionConfig": True,
    "InternVLVisionConfig": True,
    "Aimv2VisionConfig": False,
    "MLCDVisionConfig": True,
    "IJepaConfig": True,
    "MetaClip2VisionConfig": True,
    "ChineseCLIPVisionConfig": True,
    "Data2VecVisionConfig": True,
    "ViTMSNConfig": True,
    "Idefics2VisionConfig": True,  # of one image size
}


@cache
def saved(name: str) -> tuple[Path, Any]:
    """A folder with a tower of this family, and the tower."""
    config: Any = getattr(transformers, name)(**SIZES)
    kind: Any = family(config, name)[1]
    tower: Any = spread(kind._from_config(config), seed=3).eval()
    folder = root() / name
    tower.save_pretrained(folder)
    shutil.copy(siglip() / "preprocessor_config.json", folder)
    return folder, tower


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_transformers_own(name: str) -> None:
    folder, theirs = saved(name)
    for layers in (None, [1, -2]):
        encoder = HfEncoder(str(folder), layers=layers).eval()
        pixels = seen(encoder)
        out = theirs(pixel_values=pixels / 127.5 - 1, output_hidden_states=True)
        want = [out.last_hidden_state] if layers is None else [out.hidden_states[i] for i in layers]
        for got, whole in zip(encoder(pixels).grids, want, strict=True):
            assert got.shape == (2, 16, 32) and worst(got, whole[:, whole.shape[1] - 16 :]) < 1e-5
    assert worst(got[0], got[1]) > 1e-3, "it looks at the image"


@pytest.mark.parametrize("name", FAMILIES)
def test_all_it_trains_has_a_gradient(name: str) -> None:
    for layers in (None, [-2]):
        encoder = HfEncoder(str(saved(name)[0]), layers=layers).train()
        sum(grid.square().sum() for grid in encoder(seen(encoder)).grids).backward()  # type: ignore[union-attr]
        named = dict(encoder.trainable())
        assert [n for n, p in named.items() if p.grad is None] == []
        assert [n for n, p in encoder.named_parameters() if n not in named and p.grad is not None] == []


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_of_another_size(name: str) -> None:
    folder, _ = saved(name)
    if not FAMILIES[name]:
        with pytest.raises(UserError, match=r"does not take 96x96 pixels .*; set encoder\.image_size=null"):
            HfEncoder(str(folder), image_size=96)
        return
    encoder = HfEncoder(str(folder), layers=[-1], image_size=96).eval()
    assert encoder.hw == (6, 6) and encoder(seen(encoder)).grids[0].shape == (2, 36, 32)


def test_a_pooling_head_may_be_missing_where_nobody_pools(tmp_path: Path) -> None:
    """As in a checkpoint of ViT that classifies."""
    config = transformers.ViTConfig(**SIZES)
    classifier: Any = spread(transformers.ViTForImageClassification(config), seed=1)
    classifier.save_pretrained(tmp_path)
    shutil.copy(siglip() / "preprocessor_config.json", tmp_path)
    assert HfEncoder(str(tmp_path), layers=None).width == 32
    with pytest.raises(UserError, match=r"lacks weights of ViTModel \(pooler"):
        HfEncoder(str(tmp_path), pooled=True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.SwinConfig(num_heads=[3, 6, 12, 24]), "SwinModel does not take 64x64"),
        (transformers.BertConfig(), "is not the config of a vision tower of equal patches"),
        (transformers.PixtralVisionConfig(**SIZES), r"gives \(1, 32, 32\) of two images"),
        (transformers.IJepaConfig(**SIZES), "has no pooled output"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_such_tower_is_refused(config: Any, why: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    shutil.copy(siglip() / "preprocessor_config.json", tmp_path)
    with pytest.raises(UserError, match=why):
        kind: Any = family(config, "x")[1]
        kind._from_config(config).save_pretrained(tmp_path)
        HfEncoder(str(tmp_path), pooled="pooled" in why)

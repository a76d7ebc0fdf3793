"""Towers: features equal the tower's own, layers above the tap are gone, mistakes are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.tiny import CLIP_STATISTICS, VISION, clip, dinov2, picture, root, siglip, spread, worst
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, Dinov2Model, SiglipVisionModel

from vlmlab.contracts.errors import UserError
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.scratch import ScratchEncoder

TOWERS = {  # folder, class, number of tokens before the patches
    "siglip": (siglip, SiglipVisionModel, 0),
    "clip": (clip, CLIPVisionModel, 1),
    "dinov2": (dinov2, Dinov2Model, 1),
}


def seen(encoder: HfEncoder) -> torch.Tensor:
    """(2, 3, 64, 64) uint8 as the collator makes them."""
    return torch.stack([torch.from_numpy(encoder.preprocess(picture(seed, (80, 96)))) for seed in (1, 2)])


@pytest.mark.parametrize("layers", [None, [-2], [0], [1, -1], [3]], ids=str)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_features_equal_the_towers_own(name: str, layers: list[int] | None) -> None:
    folder, kind, special = TOWERS[name]
    theirs = kind.from_pretrained(folder(), dtype=torch.float32).eval()
    encoder = HfEncoder(str(folder()), layers=layers).eval()
    pixels = seen(encoder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.preprocess.mean, encoder.preprocess.std))
    out = theirs(pixel_values=(pixels / 255 - mean) / std, output_hidden_states=True)
    want = [out.last_hidden_state] if layers is None else [out.hidden_states[i] for i in layers]
    visual = encoder(pixels)
    assert len(visual.grids) == len(want) and visual.pooled is None
    assert visual.hw.tolist() == [[4, 4], [4, 4]] and encoder.hw == (4, 4)
    assert encoder.width == 32 * len(want)
    for got, whole in zip(visual.grids, want, strict=True):
        assert got.shape == (2, 16, 32) and whole.shape[1] == 16 + special
        assert worst(got, whole[:, special:]) < 1e-5


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layers", [None, [-2], [1]], ids=str)
def test_every_parameter_left_has_a_gradient(name: str, layers: list[int] | None) -> None:
    """What no feature depends on is cut off at construction."""
    encoder = HfEncoder(str(TOWERS[name][0]()), layers=layers).train()
    sum(grid.square().sum() for grid in encoder(seen(encoder)).grids).backward()
    assert [n for n, p in encoder.trainable() if p.grad is None] == []
    whole = sum(p.numel() for p in TOWERS[name][1].from_pretrained(TOWERS[name][0]()).parameters())
    left = sum(p.numel() for _, p in encoder.trainable())
    assert left < whole if layers or name != "dinov2" else left == whole - 32  # the mask token


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layers", [None, [1, -2]], ids=str)
def test_gradient_checkpointing_changes_no_gradient(name: str, layers: list[int] | None) -> None:
    kept: list[int] = []
    gradients, folder = [], str(TOWERS[name][0]())
    for checkpointing in (False, True):
        encoder = HfEncoder(folder, layers=layers, gradient_checkpointing=checkpointing).train()
        size = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = sum(grid.square().sum() for grid in encoder(seen(encoder)).grids)
        kept.append(size)
        total.backward()  # type: ignore[union-attr]
        gradients.append([p.grad for _, p in encoder.trainable()])
    assert all(worst(a, b) == 0 for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
    assert kept[1] < 0.6 * kept[0]


@torch.no_grad()
def test_pooled() -> None:
    theirs = SiglipVisionModel.from_pretrained(siglip(), dtype=torch.float32).eval()
    encoder = HfEncoder(str(siglip()), pooled=True).eval()
    pixels = seen(encoder)
    visual = encoder(pixels)
    assert worst(visual.pooled, theirs(pixel_values=pixels / 127.5 - 1).pooler_output) < 1e-5
    with pytest.raises(UserError, match=r"encoder\.pooled"):
        HfEncoder(str(siglip()), layers=[-2], pooled=True)


@torch.no_grad()
def test_the_vision_half_of_a_two_tower_checkpoint() -> None:
    text = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")}
    both = spread(CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 50}, vision_config=VISION)))
    both.save_pretrained(root() / "both")
    shutil.copy(clip() / "preprocessor_config.json", root() / "both")
    encoder = HfEncoder(str(root() / "both"), layers=[-2]).eval()
    pixels = seen(encoder)
    mean, std = (torch.tensor(CLIP_STATISTICS[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    out = both.vision_model(pixel_values=(pixels / 255 - mean) / std, output_hidden_states=True)
    assert worst(encoder(pixels).grids[0], out.hidden_states[-2][:, 1:]) < 1e-5


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers has 4.*3 layers"):
        HfEncoder(str(siglip()), layers=[4])
    with pytest.raises(UserError, match=r"encoder\.path"):
        HfEncoder(str(tmp_path / "nowhere"))
    shutil.copytree(siglip(), tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config"):
        HfEncoder(str(tmp_path / "bare"))
    shutil.copytree(siglip(), tmp_path / "sizeless")
    (tmp_path / "sizeless" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    with pytest.raises(UserError, match="height and width"):
        HfEncoder(str(tmp_path / "sizeless"))


def test_scratch() -> None:
    encoder = ScratchEncoder(64, 16, 32, 48, 2, 2, pooled=True)
    visual = encoder(seen(encoder))
    assert visual.grids[0].shape == (2, 16, 32) and visual.pooled is not None and visual.pooled.shape == (2, 32)
    assert encoder.source is None


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_class_tokens_may_be_kept(name: str) -> None:
    """They come before the patches, and the features form a row in place of a grid."""
    folder, _, special = TOWERS[name]
    encoder, without = (HfEncoder(str(folder()), layers=[-2], class_token=kept).eval() for kept in (True, False))
    pixels = seen(encoder)
    whole, patches = encoder(pixels), without(pixels)
    assert torch.equal(whole.grids[0][:, special:], patches.grids[0]) and without.hw == (4, 4)
    assert whole.grids[0].shape[1] == 16 + special and encoder.hw == ((1, 17) if special else (4, 4))
    assert whole.hw.tolist() == [list(encoder.hw)] * len(pixels)

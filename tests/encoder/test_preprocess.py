"""Pixels equal those of transformers' Pillow image processors, on sizes that round badly too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import picture
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from vlmlab.contracts.errors import UserError
from vlmlab.encoder.preprocess import Preprocess, read_preprocess

SIZES = [(64, 64), (64, 100), (101, 64), (37, 53), (480, 640), (333, 250), (65, 64), (63, 200), (5, 9), (97, 31)]


def both(processor: Any, folder: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Their normalised pixels and ours, of one random image."""
    processor.save_pretrained(folder)
    image = picture(sum(size), size)
    want = processor(images=image, return_tensors="np")["pixel_values"][0]
    settings = read_preprocess(folder)
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (settings.mean, settings.std))
    ours = settings(image)
    assert ours.dtype == np.uint8 and ours.flags["C_CONTIGUOUS"]
    return want, (ours.astype(np.float32) / 255 - mean) / std


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("side", [64, 30])
def test_siglip(size: tuple[int, int], side: int, tmp_path: Path) -> None:
    want, got = both(SiglipImageProcessorPil(size={"height": side, "width": side}), tmp_path, size)
    assert np.abs(want - got).max() < 1e-5  # one step of 1/255 would be 8e-3


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("edge", "crop"), [(64, (64, 64)), (80, (64, 64)), (64, (63, 41)), (64, (96, 80))])
def test_clip(size: tuple[int, int], edge: int, crop: tuple[int, int], tmp_path: Path) -> None:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop[0], "width": crop[1]}, do_convert_rgb=True
    )
    want, got = both(processor, tmp_path, size)
    assert want.shape[1:] == crop
    assert np.abs(want - got).max() < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (480, 640)], ids=str)
def test_other_filters_and_no_resizing(size: tuple[int, int], tmp_path: Path) -> None:
    want, got = both(SiglipImageProcessorPil(size={"height": 48, "width": 40}, resample=2), tmp_path, size)
    assert np.abs(want - got).max() < 1e-5


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = picture(3)
    assert np.array_equal(Preprocess(64, 64)(image), image.transpose(2, 0, 1))


def test_settings_without_a_size_are_refused(tmp_path: Path) -> None:
    raw = {"size": {"shortest_edge": 64}, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="height and width"):
        read_preprocess(tmp_path)

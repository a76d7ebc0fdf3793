"""Pixels and normalised values equal those of transformers' Pillow image processors to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import CLIP_STATISTICS, IMAGENET, VISION, clip, picture, save
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image
from vlmlab.data.images import ImageFolder
from vlmlab.encoder.hf import HfEncoder
from vlmlab.encoder.preprocess import Preprocess, read_preprocess

SIZES = [(64, 64), (101, 64), (37, 53), (480, 640), (333, 250), (63, 200), (5, 9), (1, 7), (1200, 900)]
CLIP: dict[str, Any] = {"size": {"shortest_edge": 60}, "crop_size": {"height": 60, "width": 60}}
PROCESSORS = {
    "siglip": SiglipImageProcessorPil(size={"height": 64, "width": 64}),
    "siglip of other statistics": SiglipImageProcessorPil(size={"height": 60, "width": 70}, resample=2, **IMAGENET),
    "clip": CLIPImageProcessorPil(**CLIP),
    "clip with a margin": CLIPImageProcessorPil(**{**CLIP, "size": {"shortest_edge": 75}}),
    "clip of its first file": CLIPImageProcessorPil(size=60, crop_size=60),
    "neither scaled nor normalised": CLIPImageProcessorPil(**CLIP, do_rescale=False, do_normalize=False),
    "scaled to half": SiglipImageProcessorPil(size={"height": 64, "width": 64}, rescale_factor=1 / 510),
    "squeezed, then cut": CLIPImageProcessorPil(**{**CLIP, "size": {"height": 80, "width": 70}}),
}


def values(settings: Preprocess, image: Image) -> np.ndarray:
    """As ``HfEncoder.forward`` has it."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    return ((torch.from_numpy(settings(image)).float() / settings.white - mean) / std).numpy()


def theirs(processor: Any, image: Image) -> np.ndarray:
    out: np.ndarray = processor(images=image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    return out


@pytest.mark.parametrize("name", PROCESSORS)
def test_random_images(name: str, tmp_path: Path) -> None:
    PROCESSORS[name].save_pretrained(tmp_path)
    settings = read_preprocess(tmp_path)
    for size in SIZES:
        want = theirs(PROCESSORS[name], picture(sum(size), size)).astype(np.float32)
        assert np.array_equal(values(settings, picture(sum(size), size)), want), size


@pytest.mark.parametrize(("name", "side"), [("siglip", 384), ("clip", 336)])
def test_photographs(name: str, side: int, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "coco_captions_mini" / "images"
    photos = ImageFolder(folder)
    size = {"height": side, "width": side}
    kind = {"siglip": SiglipImageProcessorPil(size=size)}
    kind["clip"] = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
    kind[name].save_pretrained(tmp_path)
    for path in sorted(folder.glob("*.jpg"))[:12]:
        image = photos.load(path.name)
        assert np.array_equal(values(read_preprocess(tmp_path), image), theirs(kind[name], image)), path.name


@pytest.mark.parametrize("statistics", [CLIP_STATISTICS, IMAGENET], ids=["clip", "imagenet"])
def test_the_encoder_scales_every_value_as_the_processor_does(statistics: dict[str, list[float]]) -> None:
    """All 256 values of every channel reach the tower as transformers' processor would send them."""
    processor = SiglipImageProcessorPil(size={"height": 64, "width": 64}, **statistics)
    name = f"values-{statistics['image_mean'][0]}"
    folder = save(SiglipVisionModel(SiglipVisionConfig(**VISION)), name, json.loads(processor.to_json_string()))
    encoder = HfEncoder(str(folder))
    seen: list[torch.Tensor] = []
    encoder.tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    image = np.repeat(np.arange(4096, dtype=np.int64).reshape(64, 64, 1) % 256, 3, 2).astype(np.uint8)
    encoder(torch.from_numpy(encoder.preprocess(image))[None])
    assert np.array_equal(seen[0][0].numpy(), theirs(processor, image))


def test_the_first_files_of_clip_say_one_number(tmp_path: Path) -> None:
    raw = {"crop_size": 336, "do_center_crop": True, "size": 336, "resample": 3, **CLIP_STATISTICS}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    found = read_preprocess(tmp_path)
    assert (found.height, found.width, found.shortest_edge, found.squeeze) == (336, 336, 336, None)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    assert read_preprocess(tmp_path) == Preprocess(224, 224)


def test_the_section_of_a_whole_processor(tmp_path: Path) -> None:
    size = {"size": {"height": 32, "width": 48}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": size}))
    assert read_preprocess(tmp_path) == Preprocess(32, 48)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"size": {"height": 8, "width": 8}, "do_resize": False},
            "do_resize=false, but a batch needs images of one size",
        ),
        ({"size": {"height": 8, "width": 8}, "do_pad": True}, "do_pad=true, which vlmlab does not reproduce"),
        ({"size": {"shortest_edge": 8, "longest_edge": 9}}, "has no height and width"),
        ({}, "has no height and width"),
    ],
)
def test_what_is_not_done_is_refused(raw: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words):
        read_preprocess(tmp_path)


def test_another_size_cuts_off_the_same_share() -> None:
    bigger = Preprocess(224, 224, shortest_edge=256).at(448, 448)
    assert (bigger.height, bigger.width, bigger.shortest_edge) == (448, 448, 512)
    assert Preprocess(64, 64).at(32, 48) == Preprocess(32, 48)


def test_a_square_is_padded_as_llava_pads(tmp_path: Path) -> None:
    PROCESSORS["clip"].save_pretrained(tmp_path)
    settings = replace(read_preprocess(tmp_path), square=True)
    for size in SIZES:
        want = theirs(LlavaImageProcessorPil(**CLIP, do_pad=True), picture(sum(size), size))
        assert np.array_equal(values(settings, picture(sum(size), size)), want), size


def test_the_encoder_is_told_to_pad() -> None:
    assert HfEncoder(str(clip()), square=True).preprocess == replace(HfEncoder(str(clip())).preprocess, square=True)

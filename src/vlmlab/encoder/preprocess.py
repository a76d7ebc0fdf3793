"""How a tower wants its pixels: geometry for the collator, statistics for the encoder. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pil

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalisation of one tower.

    Attributes:
        height, width: pixels that the tower takes.
        mean, std: per channel, of values scaled to 0..1.
        resample: Pillow's filter number (3 is bicubic, 2 bilinear).
        shortest_edge: scale the shorter side to this many pixels and cut the centre out (CLIP); None squeezes (SigLIP).
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = 3
    shortest_edge: int | None = None

    def __call__(self, image: Image) -> Image:
        """(H, W, 3) uint8 of any size -> (3, height, width) uint8."""
        if self.shortest_edge is None and image.shape[:2] == (self.height, self.width):
            return np.ascontiguousarray(image.transpose(2, 0, 1))
        picture = Pil.fromarray(image)
        if self.shortest_edge is None:
            picture = picture.resize((self.width, self.height), Pil.Resampling(self.resample))
        else:
            picture = self._crop(picture, self.shortest_edge)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def _crop(self, picture: Pil.Image, edge: int) -> Pil.Image:
        width, height = picture.size
        short, long = min(width, height), max(width, height)
        scaled_long = int(edge * long / short)
        size = (edge, scaled_long) if width <= height else (scaled_long, edge)
        picture = picture.resize(size, Pil.Resampling(self.resample))
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        return picture.crop((left, top, left + self.width, top + self.height))


def read_preprocess(folder: Path) -> Preprocess:
    """The settings in a tower's ``preprocessor_config.json``.

    Raises:
        UserError: the file is missing or has no size.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no preprocessor_config.json; save the tower's image processor beside it.")
    raw = json.loads(path.read_text())
    size, crop = raw.get("size") or {}, raw.get("crop_size") or {}
    shortest = size.get("shortest_edge")
    box = crop if shortest and raw.get("do_center_crop", True) else size
    if "height" not in box or "width" not in box:
        raise UserError(f"{path}: size {size} has no height and width; give the pixels the tower takes.")
    return Preprocess(
        height=box["height"],
        width=box["width"],
        mean=tuple(raw.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(raw.get("image_std", (0.5, 0.5, 0.5))),
        resample=raw.get("resample", 3),
        shortest_edge=shortest,
    )

"""How a tower wants its pixels: geometry for the collator, statistics for the encoder. Free of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pil

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image
from vlmlab.encoder.resample import FILTERS, Line, resample

_THIN = 8
"""From this many times as long as wide on, an image that is cut or padded is resized only where it is seen."""

PADS = "LlavaImageProcessor"
"""The image processor that can pad to a square in the mean colour."""

FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers keeps an image processor's settings: its own file, or a section of the whole processor's."""


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalisation of one tower.

    The pixels are those of transformers' Pillow image processors, bit for bit, in an eighth of the bytes: they stay
    uint8 until the encoder scales them.

    Attributes:
        height, width: pixels that the tower takes.
        mean, std: per channel, of the scaled values.
        resample: Pillow's filter number (3 is bicubic, 2 bilinear).
        shortest_edge: scale the shorter side to this many pixels and cut the centre out (CLIP); None squeezes (SigLIP).
        squeeze: rows and columns to squeeze to before the centre is cut out; None: height and width.
        white: the value of a pixel that is scaled to 1.
        square: first pad the image to a square in the mean colour (LLaVA-1.5), so that nothing is cut off or squeezed.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = 3
    shortest_edge: int | None = None
    squeeze: tuple[int, int] | None = None
    white: float = 255.0
    square: bool = False

    def __call__(self, image: Image) -> Image:
        """(H, W, 3) uint8 of any size -> (3, height, width) uint8."""
        if self._wastes(*image.shape[:2]):
            return np.ascontiguousarray(self._seen(image).transpose(2, 0, 1))
        if self.square:
            image = self._squared(image)
        rows, columns = self._scaled(*image.shape[:2])
        if image.shape[:2] == (rows, columns) == (self.height, self.width):
            return np.ascontiguousarray(image.transpose(2, 0, 1))
        picture = Pil.fromarray(image).resize((columns, rows), Pil.Resampling(self.resample))
        left, top = (columns - self.width) // 2, (rows - self.height) // 2
        if (rows, columns) != (self.height, self.width):  # what lies outside is black
            picture = picture.crop((left, top, left + self.width, top + self.height))
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def save(self, folder: Path, processor: str) -> None:
        """Write the ``preprocessor_config.json`` that says the same (padding to a square is a key of the encoder's).

        A published processor pads, too: ``LlavaImageProcessor`` does.

        Args:
            folder: where the tower is.
            processor: class of transformers that reads it, such as ``SiglipImageProcessor``.
        """
        settings = {"image_processor_type": processor, **self._geometry()}
        if self.square and processor == PADS:
            settings = {"do_center_crop": False, **settings, "do_pad": True}
        (folder / FILES[0]).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _geometry(self) -> dict[str, Any]:
        """The keys of transformers' image processors."""
        box = {"height": self.height, "width": self.width}
        size: dict[str, int] = box
        if self.shortest_edge is not None:
            size = {"shortest_edge": self.shortest_edge}
        elif self.squeeze is not None:
            size = {"height": self.squeeze[0], "width": self.squeeze[1]}
        crop = {} if size is box else {"do_center_crop": True, "crop_size": box}
        return {
            "size": size,
            **crop,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": self.resample,
            "do_resize": True,
            "do_normalize": True,
            "do_rescale": self.white != 1.0,
            "rescale_factor": 1 / self.white,
        }

    def at(self, height: int, width: int) -> Preprocess:
        """The same for a tower that takes `height` x `width` pixels: what is cut off stays the same share."""
        share = min(height, width) / min(self.height, self.width)
        edge = None if self.shortest_edge is None else round(self.shortest_edge * share)
        return replace(self, height=height, width=width, shortest_edge=edge, squeeze=None)

    def _squared(self, image: Image) -> Image:
        """The image in the middle of a square of the mean colour."""
        rows, columns = image.shape[:2]
        side = max(rows, columns)
        top, left = (side - rows) // 2, (side - columns) // 2
        out = np.empty((side, side, 3), np.uint8)
        out[:] = self._colour()
        out[top : top + rows, left : left + columns] = image
        return out

    def _wastes(self, rows: int, columns: int) -> bool:
        """Whether the image is so thin that the usual way makes many pixels for nothing."""
        thin = max(rows, columns) > _THIN * min(rows, columns) and self.resample in FILTERS
        return thin and (self.square or (self.shortest_edge or 0) >= min(rows, columns))

    def _seen(self, image: Image) -> Image:
        """(height, width, 3) of a thin image, the same pixels as by the usual way; what lies outside is black."""
        sizes = image.shape[:2]
        side = max(sizes)
        whole = (side, side) if self.square else sizes
        out = np.zeros((self.height, self.width, 3), np.uint8)
        lines, places = [], []
        for n, before, after, box in zip(sizes, whole, self._scaled(*whole), out.shape[:2], strict=True):
            cut = (after - box) // 2  # below 0 where the box is larger
            first, last = max(cut, 0), min(cut + box, after)
            lines.append(Line(before, after, first, last - first, (before - n) // 2))
            places.append(slice(first - cut, last - cut))
        out[places[0], places[1]] = resample(image, lines[0], lines[1], self.resample, self._colour())
        return out

    def _colour(self) -> tuple[int, ...]:
        """The mean colour, with which a square is padded."""
        return tuple(int(mean * 255) for mean in self.mean)

    def _scaled(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns after resizing, before the centre is cut out."""
        if self.shortest_edge is None:
            return self.squeeze or (self.height, self.width)
        long = int(self.shortest_edge * max(rows, columns) / min(rows, columns))
        return (long, self.shortest_edge) if columns <= rows else (self.shortest_edge, long)


def processor_of(preprocess: Preprocess) -> str:
    """An image processor of transformers that says the same, but for padding; SigLIP's cuts nothing out."""
    cuts = preprocess.shortest_edge is not None or preprocess.squeeze is not None
    return "CLIPImageProcessor" if cuts else "SiglipImageProcessor"


def read_preprocess(folder: Path, settings: tuple[Path, dict[str, Any]] | None = None) -> Preprocess:
    """The settings in a tower's ``preprocessor_config.json``, or the image section of its ``processor_config.json``.

    Args:
        folder: the tower's.
        settings: a file and what is taken for its content; None: what is there.

    Raises:
        UserError: the file is missing, gives images no single size, or asks for something that is not done here.
    """
    path, raw = settings_of(folder) if settings is None else settings
    if raw.get("do_resize") is False:
        raise UserError(f"{path} has do_resize=false, but a batch needs images of one size; give it a size.")
    if raw.get("do_pad"):
        raise UserError(f"{path} has do_pad=true, which vlmlab does not reproduce; save a processor without padding.")
    size, box, squeeze = _geometry(path, raw)
    normalised = raw.get("do_normalize") is not False
    factor = raw.get("rescale_factor") or 1 / 255
    filter_number = raw.get("resample")
    return Preprocess(
        height=box[0],
        width=box[1],
        mean=tuple(raw.get("image_mean") or (0.5, 0.5, 0.5)) if normalised else (0.0, 0.0, 0.0),
        std=tuple(raw.get("image_std") or (0.5, 0.5, 0.5)) if normalised else (1.0, 1.0, 1.0),
        resample=3 if filter_number is None else filter_number,
        shortest_edge=size,
        squeeze=squeeze,
        white=1.0 if raw.get("do_rescale") is False else 1 / factor,
    )


def settings_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of an image processor, and its settings.

    Raises:
        UserError: there is none.
    """
    for name in FILES:
        path = folder / name
        if path.is_file():
            raw = json.loads(path.read_text())
            return path, raw.get("image_processor", raw)
    raise UserError(f"{folder} has no {FILES[0]}; save the tower's image processor beside it.")


def _geometry(path: Path, raw: dict[str, Any]) -> tuple[int | None, tuple[int, int], tuple[int, int] | None]:
    """Shortest edge or None, (height, width) of the result, and what is squeezed to before a crop or None."""
    size, crop = raw.get("size") or {}, raw.get("crop_size")
    crops = bool(raw.get("do_center_crop", crop is not None))
    if isinstance(size, int):  # files of early CLIPs: one number, the shorter side where the centre is cut out
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    edge = size.get("shortest_edge")
    box = crop if crops and crop else size
    if "height" not in box or "width" not in box or size.get("longest_edge"):
        raise UserError(f"{path}: size {size} has no height and width; give the pixels the tower takes.")
    target = (int(box["height"]), int(box["width"]))
    if edge is not None:
        return int(edge), target, None
    squeeze = (int(size["height"]), int(size["width"]))
    return None, target, None if squeeze == target else squeeze

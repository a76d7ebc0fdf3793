"""Preprocessing of photographs: time of vlmlab's against transformers' Pillow processor, in one process and run.

    python benchmarks/preprocess.py [folder of images] [--images 24] [--rounds 7]

Both start from decoded (H, W, 3) uint8 arrays and one thread. "pixels" is what a data worker does (resize to uint8;
the encoder normalises, on its device); "values" adds that normalisation on the CPU, so that both give the same floats,
which is checked. Ratios are of the medians over rounds that take turns; below 1 vlmlab is faster. Times are those of
this process's own computing, which neighbours on the machine disturb less than the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from vlmlab.contracts.sample import Image
from vlmlab.data.images import ImageFolder
from vlmlab.encoder.preprocess import Preprocess, read_preprocess

CASES = {
    "siglip 224": SiglipImageProcessorPil(size={"height": 224, "width": 224}),
    "siglip 384": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "clip 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
}


def images(folder: Path | None, most: int) -> list[Image]:
    """Photographs of a folder, or random pixels of a photograph's size."""
    if folder is None:
        return [np.random.default_rng(i).integers(0, 256, (480, 640, 3), dtype=np.uint8) for i in range(most)]
    found = ImageFolder(folder)
    return [found.load(path.name) for path in sorted(folder.glob("*.jpg"))[:most]]


def normalised(settings: Preprocess, pixels: Image) -> torch.Tensor:
    """As the encoder does it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return torch.from_numpy(pixels).float().div_(settings.white).sub_(mean).div_(std)


def timed(work: Callable[[Image], Any], pictures: list[Image]) -> float:
    """Milliseconds per image."""
    start = time.process_time()
    for picture in pictures:
        work(picture)
    return (time.process_time() - start) / len(pictures) * 1e3


def compare(name: str, processor: Any, pictures: list[Image], rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        settings = read_preprocess(Path(folder))

    def theirs(picture: Image) -> Any:
        return processor(images=picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]

    for picture in pictures:
        assert torch.equal(theirs(picture), normalised(settings, settings(picture))), "not the same values"
    ways: dict[str, Callable[[Image], Any]] = {
        "theirs": theirs,
        "pixels": settings,
        "values": lambda picture: normalised(settings, settings(picture)),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            times[way].append(timed(work, pictures))
    median = {way: statistics.median(values) for way, values in times.items()}
    ratios = ", ".join(
        f"{way} {median[way]:.2f} ms, ratio {median[way] / median['theirs']:.2f}" for way in list(ways)[1:]
    )
    return f"{name}: transformers {median['theirs']:.2f} ms; {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=24, help="at most")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pictures = images(given.folder, given.images)
    for name, processor in CASES.items():
        print(compare(name, processor, pictures, given.rounds), flush=True)


if __name__ == "__main__":
    main()

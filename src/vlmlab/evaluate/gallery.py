"""A dozen images of a run with everything that was said about them, for ``report.html``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmlab.contracts.sample import Image, SampleSource
from vlmlab.evaluate.metrics.rows import Row, read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlmlab.analyse.report import ReportItem


def write_gallery(cfg: DictConfig, folder: Path, result: Mapping[str, Any], title: str, count: int = 12) -> Path:
    """Write ``report.html`` with the first images of every benchmark in turn.

    Args:
        cfg: the run's configuration.
        folder: the run's folder with its predictions.
        result: the contents of ``result.json``.
        title: heading of the page.
        count: number of images.
    """
    from hydra.utils import instantiate

    from vlmlab.analyse.report import write_report

    each = [_items(folder, str(name), instantiate(b.source), count) for name, b in cfg.data.benchmarks.items()]
    mixed = [item for turn in zip_longest(*each) for item in turn if item is not None]
    return write_report(folder, mixed[:count], result, title)


def _items(folder: Path, benchmark: str, source: SampleSource, count: int) -> Iterator[ReportItem]:
    """One item per image, in the order of the benchmark, at most `count`."""
    from vlmlab.analyse.report import ReportItem

    path, wrong_path = predictions_file(folder, benchmark), predictions_file(folder, benchmark, "shuffled")
    if not path.is_file():
        return
    rows = read_rows(path)
    wrong = read_rows(wrong_path) if wrong_path.is_file() else []
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if row.image_ids:
            groups.setdefault(row.image_ids, []).append(index)
    for names, indices in list(groups.items())[:count]:
        yield ReportItem(
            image=side_by_side(source[indices[0]].images),
            image_id=", ".join(names),
            rows=[rows[i] for i in indices],
            shuffled=_matching(wrong, indices),
        )


def _matching(wrong: list[Row], indices: list[int]) -> list[Row]:
    return [wrong[i] for i in indices if i < len(wrong)]


def side_by_side(images: tuple[Image, ...]) -> Image:
    """Several images as one, their tops in line: (H, W1 + W2 + ..., 3)."""
    height = max(image.shape[0] for image in images)
    padded = [np.pad(image, ((0, height - image.shape[0]), (0, 4), (0, 0)), constant_values=255) for image in images]
    return np.concatenate(padded, 1)[:, :-4]

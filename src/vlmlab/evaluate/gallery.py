"""Images of a run, or of two, with everything that was said about them, for ``report.html``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Image, SampleSource
from vlmlab.evaluate.metrics.rows import Row, read_rows
from vlmlab.evaluate.metrics.scoring import predictions_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vlmlab.analyse.report import ReportItem
    from vlmlab.analyse.sweep_report import Pair


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


def write_sweep_gallery(
    sweep: Path,
    cells: Sequence[str] | None = None,
    trust: bool = False,
    metric: str | None = None,
    cost: str | None = None,
) -> Path:
    """Write ``report.html`` into a sweep's folder and return its path.

    Args:
        sweep: the folder.
        cells: two of it whose answers are shown; None: the first composition's and the best other one's, of one seed.
        trust: make classes from outside the package that the first of them names.
        metric: what heatmap and Pareto plot show; None: the first of the table.
        cost: what that is drawn against; None: the first that differs.

    Raises:
        UserError: no finished cell has the metric or cost, or a cell's configuration cannot be used.
    """
    from hydra.errors import InstantiationException

    from vlmlab.analyse.results import read_sweep
    from vlmlab.analyse.sweep_report import telling_cells, write_sweep_report
    from vlmlab.runs.trust import saved_config

    records = read_sweep(sweep)
    names = list(cells) if cells is not None else telling_cells(records, metric)
    if len(names) != 2:
        return write_sweep_report(sweep, records, metric=metric, cost=cost)
    first, second = (sweep / name for name in names)
    pairs, why = [], ""
    try:
        pairs = paired_answers(first, second, saved_config(first, trust).data.benchmarks)
    except (UserError, InstantiationException) as error:
        if cells is not None:
            raise
        why = str(error)  # the page comes, and says so
    return write_sweep_report(sweep, records, (names[0], names[1]), pairs, metric, cost, why)


def paired_answers(
    first: Path, second: Path, benchmarks: Mapping[str, Any], count: int = 8, turns: int = 4
) -> list[Pair]:
    """What two runs answered to the same questions about the same images, those in turn that they answered otherwise.

    Args:
        first: a run's folder.
        second: another one's.
        benchmarks: ``data.benchmarks`` of their configuration.
        count: of images.
        turns: of one image, at most.
    """
    from hydra.utils import instantiate

    found: list[list[Pair]] = []
    for name, benchmark in benchmarks.items():
        ones, others = (_answered(folder, str(name)) for folder in (first, second))
        groups: dict[tuple[str, ...], list[tuple[int, Row, Row]]] = {}
        for key, (index, row) in ones.items():
            if key in others and row.image_ids and others[key][1].image_ids == row.image_ids:
                groups.setdefault(row.image_ids, []).append((index, row, others[key][1]))
        telling = sorted(groups, key=lambda image: -sum(_differ(*both) for _, *both in groups[image]))[:count]
        source: SampleSource | None = instantiate(benchmark.source) if telling else None
        pairs = []
        for names in telling:
            rows = sorted(groups[names], key=lambda item: not _differ(*item[1:]))[:turns]
            if source is not None and rows[0][0] < len(source):
                image = side_by_side(source[rows[0][0]].images)
                pairs.append(_pair(image, names, rows))
        found.append(pairs)
    return [pair for turn in zip_longest(*found) for pair in turn if pair is not None][:count]


def _pair(image: Image, names: tuple[str, ...], rows: Sequence[tuple[int, Row, Row]]) -> Pair:
    from vlmlab.analyse.sweep_report import Pair

    return Pair(image, ", ".join(names), [(one, other) for _, one, other in rows])


def _differ(one: Row, other: Row) -> bool:
    return one.prediction != other.prediction


def _answered(folder: Path, benchmark: str) -> dict[tuple[str, int], tuple[int, Row]]:
    """The answers of a run by sample and turn, each with the place of its sample in the benchmark."""
    path = predictions_file(folder, benchmark)
    if not path.is_file():
        return {}
    places: dict[str, int] = {}
    found = {}
    for row in read_rows(path):
        found[row.id, row.turn] = (places.setdefault(row.id, len(places)), row)
    return found


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

"""What two towers are asked: benchmarks that compare images with texts, with the shuffled baseline beside each score.

They are in ``data.pairs``, by name, as benchmarks of a language model are in ``data.benchmarks``; their scores are
in ``result.json`` and in the table under ``<name>/<score>``, and what was found for each query in ``predictions``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from vlmlab.contracts.errors import DataError
from vlmlab.contracts.sample import Image, SampleSource
from vlmlab.data.skipped import note
from vlmlab.evaluate.baselines import Limited, Shuffled
from vlmlab.evaluate.metrics.rows import Row, write_rows
from vlmlab.evaluate.metrics.scoring import predictions_file

SHUFFLED = "shuffled"


@dataclass(frozen=True)
class Found:
    """What a benchmark of two towers found.

    Attributes:
        scores: by name; the first is the one that chance belongs to.
        rows: for people to read.
        levels: what describes the set: ``chance``, ``count``.
    """

    scores: dict[str, float]
    rows: list[Row]
    levels: dict[str, float] = field(default_factory=dict)


class Towers(Protocol):
    """What embeds images and texts in one space (``PairedTowers``)."""

    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """(I, E) unit vectors."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(T, E) unit vectors."""
        ...


class PairBenchmark(Protocol):
    """A benchmark of two towers.

    Attributes:
        source: its samples, as they are.
    """

    source: SampleSource

    def __call__(self, towers: Towers, source: SampleSource, name: str, batch_size: int) -> Found:
        """The scores of `source`, which is the own one, a part of it, or either with other images."""
        ...


def pair_parts(
    towers: Towers, cfg: DictConfig, folder: Path, say: Callable[[str], None]
) -> dict[str, Callable[[], Mapping[str, float]]]:
    """What gives the scores of every benchmark of ``data.pairs``, by its name.

    Args:
        towers: a trained pair, in evaluation mode.
        cfg: the run's configuration: ``data.pairs``, ``evaluation``, ``budget``.
        folder: the run's folder.
        say: takes one line of progress at a time.
    """
    named = cfg.data.get("pairs") or {}
    if left := [str(name) for name in cfg.evaluation.baselines if name != SHUFFLED]:
        say(f"note: evaluation.baselines: {', '.join(left)} is left out, two towers compare nothing without an image")
    if asked := list(cfg.data.get("benchmarks") or {}):
        say(
            f"note: data.benchmarks: {', '.join(map(str, asked))} ask a language model, two towers are asked data.pairs"
        )
    return {str(name): partial(_benchmark, towers, cfg, folder, str(name), say) for name in named}


def check_pairs(cfg: DictConfig) -> None:
    """Before the first step: make every benchmark of ``data.pairs``, and see that it has two samples to compare.

    Raises:
        DataError: it has not; names its key.
    """
    for name, node in (cfg.data.get("pairs") or {}).items():
        source = Limited(instantiate(node).source, cfg.budget.eval_limit)
        if len(source) < 2:
            raise DataError(
                f"data.pairs.{name} has {len(source)} samples and compares images with each other; give it more, or "
                "raise budget.eval_limit."
            )


def _benchmark(
    towers: Towers, cfg: DictConfig, folder: Path, name: str, say: Callable[[str], None]
) -> dict[str, float]:
    benchmark: PairBenchmark = instantiate(cfg.data.pairs[name])
    note(folder, f"data.pairs.{name}", getattr(benchmark.source, "skipped", []))
    source = Limited(benchmark.source, cfg.budget.eval_limit)
    size = int(cfg.evaluation.batch_size)
    found = benchmark(towers, source, name, size)
    write_rows(predictions_file(folder, name), found.rows)
    say(f"{name}: {len(found.rows)} queries")
    scores = {f"{name}/{key}": value for key, value in {**found.scores, **found.levels}.items()}
    if SHUFFLED in cfg.evaluation.baselines:
        wrong = benchmark(towers, Shuffled(source), name, size)
        write_rows(predictions_file(folder, name, SHUFFLED), wrong.rows)
        scores |= {f"{name}/{key}/{SHUFFLED}": value for key, value in wrong.scores.items()}
    return scores


def embedded_images(towers: Towers, source: SampleSource, chosen: Sequence[int], batch_size: int) -> Tensor:
    """(I, E) of the first image of every chosen sample."""
    groups = (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    return torch.cat([towers.embed_images([source[index].images[0] for index in group]) for group in groups])


def embedded_texts(towers: Towers, texts: Sequence[str], batch_size: int) -> Tensor:
    """(T, E) of every text."""
    groups = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
    return torch.cat([towers.embed_texts(group) for group in groups])

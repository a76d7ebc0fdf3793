"""A slice of a benchmark, as it is asked while a model trains: its first questions, with their images and with others'.

Its scores go by ``slice/<benchmark>/<score>``, so that they are not taken for those of the whole benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hydra.utils import instantiate
from omegaconf import DictConfig

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Metric, SampleSource
from vlmlab.evaluate.baselines import Limited, Shuffled
from vlmlab.evaluate.metrics.scoring import score_rows
from vlmlab.evaluate.run import answer
from vlmlab.model.vlm import VLM

PLACE = "slice/"
"""Beginning of the names of all scores of slices."""


class Slice:
    """The first questions of one benchmark.

    Args:
        cfg: the run's configuration; ``evaluation.slice_samples`` says how many they are.
        name: of the benchmark.

    Raises:
        UserError: a metric needs more questions than the slice has.
    """

    def __init__(self, cfg: DictConfig, name: str) -> None:
        benchmark = cfg.data.benchmarks[name]
        self.cfg, self.name, self.most = cfg, name, int(benchmark.max_new_tokens)
        self.metrics: list[Callable[[], Metric]] = [partial(instantiate, metric) for metric in benchmark.metrics]
        source = Limited(instantiate(benchmark.source), int(cfg.evaluation.slice_samples))
        self.sets: dict[str, SampleSource] = {"": source, "shuffled": Shuffled(source)}
        for metric in (make() for make in self.metrics):
            least = int(getattr(metric, "least_rows", 1))
            if len(source) < least:
                raise UserError(
                    f"evaluation.slices has {name} with {len(source)} questions and {type(metric).__name__} needs "
                    f"{least}; raise evaluation.slice_samples."
                )

    def scores(self, model: VLM) -> dict[str, float]:
        """``slice/<benchmark>/<score>``, and the same with ``/shuffled``: answered with another question's images."""
        found: dict[str, float] = {}
        for baseline, source in self.sets.items():
            rows = answer(model, self.cfg, self.name, source, self.most)
            found |= score_rows(rows, self.metrics, f"{PLACE}{self.name}", baseline)
        return found

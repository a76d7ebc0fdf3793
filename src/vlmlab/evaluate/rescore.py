"""The scores of a run from the answers that it keeps: with its own metrics, or with others. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from vlmlab.contracts.errors import UserError, listed, reason
from vlmlab.contracts.sample import Metric
from vlmlab.contracts.terminal import tell
from vlmlab.evaluate.metrics.scoring import lost_answers, score_predictions
from vlmlab.runs.trust import building, is_ours


def rescored(
    folder: Path, config: DictConfig, benchmarks: Sequence[str] | None, metrics: Sequence[str] | None, trust: bool
) -> dict[str, float]:
    """Scores keyed ``<benchmark>/<score>[/<baseline>]``.

    Args:
        folder: the run's.
        config: the run's configuration.
        benchmarks: names of some of the run's; None: all.
        metrics: dotted paths of metric classes that are made without arguments; None: the run's own.
        trust: whether classes from outside vlmlab may be used.

    Raises:
        UserError: an unknown benchmark or metric, or answers that a metric cannot score.
        DataError: predictions that are missing or damaged.
    """
    known = [str(name) for name in config.data.benchmarks]
    for name in benchmarks or ():
        if name not in known:
            raise UserError(
                f"benchmarks has {name}, which {folder} did not answer; choose some of {listed(known, 200)}."
            )
    others = None if metrics is None else [_metric(name, trust) for name in metrics]
    scores: dict[str, float] = {}
    for name in benchmarks or known:
        with building(folder):
            own = [partial(instantiate, metric) for metric in config.data.benchmarks[name].metrics]
        chosen = own if others is None else others
        for note in lost_answers(folder, name, chosen):
            tell(f"note: {note}")
        scores |= score_predictions(folder, name, chosen)
    return scores


def _metric(name: str, trust: bool) -> Callable[[], Metric]:
    if not trust and not is_ours(name):
        raise UserError(f"metrics has {name}, which is from outside vlmlab; trust=true uses it.")
    try:
        found: Any = get_class(name)
        made = found()
    except Exception as error:
        raise UserError(f"metrics has {name}, which is not a metric without arguments ({reason(error)}).") from error
    if not isinstance(made, Metric):
        raise UserError(f"metrics has {name}, which is not a metric; one is vlmlab.evaluate.metrics.vqa.VqaAccuracy.")
    return found  # type: ignore[no-any-return]

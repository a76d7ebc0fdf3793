"""The values that a search chooses among, from the words of a sweep in Hydra's grammar. Optuna is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer

from vlmlab.cli.entry import ConfigError
from vlmlab.runs.names import SEED

LOG = "log"
"""Tag of an interval or range whose values are drawn on a logarithmic scale: ``tag(log, interval(1e-5, 1e-2))``."""


def space_of(words: Sequence[str], loader: Any = None) -> tuple[dict[str, Any], list[str]]:
    """Optuna's distribution of every key that is swept, and the words that have one value.

    ``a,b``, ``choice(a, b)`` and ``glob(*)`` are choices; ``range(1, 5)`` whole numbers or steps, its end left out as
    in any sweep; ``interval(0, 1)`` any number, ``int(interval(1, 8))`` a whole one.

    Args:
        words: overrides.
        loader: knows the choices of a group.

    Raises:
        ConfigError: a word is not a range of values, or nothing is swept.
    """
    space: dict[str, Any] = {}
    fixed: list[str] = []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(words)):
        if not override.is_sweep_override():
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
            continue
        key = override.get_key_element()
        if key.lstrip("+") == SEED:
            raise ConfigError(
                f"{override.input_line} is nothing to search: no seed is better than another; give one, and run the "
                "best cells again with several"
            )
        space[key] = _distribution(override)
    if not space:
        raise ConfigError("sweep=optuna has nothing to choose; give a key several values, as connector=mlp,qformer")
    return space, fixed


def _distribution(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution

    value, word = override.value(), override.input_line
    if override.is_interval_sweep() and isinstance(value, IntervalSweep):
        return _interval(value, str(word))
    if override.is_range_sweep() and isinstance(value, RangeSweep) and not value.shuffle:
        return _range(value, str(word))
    choices = [str(one) for one in override.sweep_iterator(transformer=Transformer.encode)]
    if not choices:
        raise ConfigError(f"{word} gives no value, so that nothing would run")
    return CategoricalDistribution(choices)


def _interval(value: IntervalSweep, word: str) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high, log = value.start, value.end, LOG in value.tags
    if low is None or high is None or low >= high or (log and low <= 0):
        raise ConfigError(f"{word} is not an interval; give two numbers, the smaller first{', above 0' if log else ''}")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _range(value: RangeSweep, word: str) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    start, stop, step = value.start, value.stop, value.step
    if start is None or stop is None or step <= 0 or stop <= start:
        raise ConfigError(f"{word} gives no value, so that nothing would run")
    first, each = Decimal(str(start)), Decimal(str(step))
    last = first + (math.ceil((Decimal(str(stop)) - first) / each) - 1) * each
    if all(isinstance(one, int) for one in (start, stop, step)):
        log = LOG in value.tags and step == 1
        return IntDistribution(int(start), int(last), log=log, step=int(step))
    return FloatDistribution(float(start), float(last), step=float(step))


def words_of(params: Mapping[str, Any]) -> list[str]:
    """The overrides of a trial's parameters."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]

"""``vlmlab plan -m ... effect=0.03 power=0.8 pilot=<sweep>``: how many seeds the comparisons of a sweep need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmlab.cli.entry import ConfigError
from vlmlab.cli.verb import compose_cells, launcher, own_keys, quoted
from vlmlab.runs.names import override_key

CLAIM = ("effect", "power", "pilot", "metric")
"""The keys of ``conf/plan.yaml`` that are about a sweep; the others are about one composition."""


def run_seeds(words: Sequence[str]) -> int:
    """Compose the cells of the sweep as training would, and say what their seeds can show; the exit code."""
    return compose_cells(lambda sweep: launched(words, sweep))


def launched(words: Sequence[str], sweep: Path) -> list[str]:
    """The words for Hydra: those about the claim are the launcher's keys.

    Raises:
        ConfigError: a key is about one composition, or has a value it cannot have.
    """
    others = [key for key in own_keys("plan") if key not in CLAIM]
    found = []
    for word in words:
        key, given, value = word.partition("=")
        if given and override_key(word) in CLAIM:
            found.append(f"hydra.launcher.{key.lstrip('+')}={_checked(key.lstrip('+'), value)}")
        elif given and override_key(word).split(".")[0] in others:
            raise ConfigError(
                f"{word} is about one composition; leave it out, or leave out -m and give one value a key"
            )
        else:
            found.append(word)
    return [*found, *launcher("seeds", sweep)]


def _checked(key: str, value: str) -> str:
    """The value of a key of the claim, for Hydra."""
    if value == "null" and key != "power":
        return value
    if key in ("pilot", "metric"):
        if key == "pilot" and not Path(value).exists():
            raise ConfigError(
                f"pilot={value} is not there; give the folder of a finished sweep (sweeps/<name>), or its cells.csv"
            )
        return quoted(value)
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < (1 if key == "power" else float("inf")):
        wanted = "a share between 0 and 1" if key == "power" else "a difference above 0, such as 0.03"
        raise ConfigError(f"{key}={value} is not possible; give {wanted}")
    return repr(number)

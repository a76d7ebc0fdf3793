"""The compare command: ``vlmlab compare <sweep> baseline=...`` says what a sweep has shown. Nothing is loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import ConfigError, guard, run_command
from vlmlab.cli.finished import check_own
from vlmlab.cli.rules.schema import Compare
from vlmlab.contracts.terminal import tell

EXAMPLE = "vlmlab compare sweeps/<name> baseline=mlp,bidir"
TEXTS = ("folder", "baseline", "metric", "until", "out")
"""Keys whose values are taken as they are typed, with the signs that mean something elsewhere."""


def compare_command(cfg: DictConfig) -> None:
    """Print the comparison and write its files.

    Raises:
        ConfigError: the sweep or ``baseline`` is missing, or a folder is none.
        UserError: nothing has finished, or there is no such row, metric or number.
    """
    for key, word in (("folder", "sweep"), ("baseline", "baseline")):
        if OmegaConf.is_missing(cfg, key):
            raise ConfigError(f"which {word}? write {word}=..., as in: {EXAMPLE}")
    check_own(cfg, Compare)
    sweep = Path(str(cfg.folder))
    out = None if cfg.out is None else Path(str(cfg.out))
    for key, folder in (("sweep", sweep), ("out", out)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{key}={folder} is not a folder; give an existing one, as in: {EXAMPLE}")
    from vlmlab.analyse.compare_report import write_comparison  # numpy and scipy

    tell(write_comparison(sweep, str(cfg.baseline), _text(cfg.metric), _text(cfg.until), out))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def spelled(words: Sequence[str]) -> list[str]:
    """The words for Hydra: a first one without a key is the sweep, and the texts among the values are quoted.

    The sweep's folder is ``folder`` there, since ``sweep`` is a group of the training's.
    """
    found = [f"folder={word.removeprefix('sweep=')}" if word.startswith("sweep=") else word for word in words]
    first = next((i for i, word in enumerate(found) if not word.startswith("-")), None)
    if first is not None and "=" not in found[first]:
        found[first] = f"folder={found[first]}"
    return [_quoted(word) for word in found]


def _quoted(word: str) -> str:
    key, given, value = word.partition("=")
    if key not in TEXTS or not given or value in ("", "null") or re.fullmatch(r"([\"']).*\1", value):
        return word
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


if __name__ == "__main__":
    conf = conf_folder()
    sys.argv[1:] = spelled(sys.argv[1:])
    main = hydra.main(config_path=str(conf), config_name="compare", version_base="1.3")(guard(compare_command))
    sys.exit(run_command(main, conf, "compare"))

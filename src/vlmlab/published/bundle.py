"""A run as a portable folder: what ``vlmlab.load`` needs of it, and the towers it was built from.

<folder>/config.yaml, result.json, env.json, stages/   the run's, without the state of its optimizers
<folder>/towers/<part>                                 towers that its configuration names by path
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlmlab.runs.config import leaves, plain
from vlmlab.runs.files import share, write_json
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.trust import CARRIED
from vlmlab.towers.source import resolve

OWN = ("config.yaml", "result.json", "cost.json")
KEPT = ("code", "codes", "git", "packages", "training", "overrides", "stages", "published", "environment", "precision")
"""What of ``env.json`` is the run's; the rest is the machine's."""

TOWERS = ("encoder", "lm", "text_tower")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")


def bundle(run: Path, cfg: DictConfig, folder: Path) -> None:
    """Copy a finished run.

    Args:
        run: its folder.
        cfg: its configuration, as it is here.
        folder: a new or empty one.

    Raises:
        UserError: a tower is not where the configuration says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in OWN:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    for file in sorted(run.glob("stages/*/*")):
        if file.name in ("model.safetensors", "stage.json"):
            to = folder / file.relative_to(run)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
    there = {}
    for key, path in _paths(cfg):
        there[key] = f"towers/{key.removesuffix('.path').replace('.', '_')}"
        _copy_tower(resolve(path, key), folder / there[key])
    env = RunFolder(run).env()
    kept = {key: env[key] for key in KEPT if key in env} | {CARRIED: there}
    write_json(folder / "env.json", kept)
    write_json(folder / "state.json", {"state": "done"})


def _paths(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Keys of towers that are somewhere on this machine, or a hub's."""
    config: dict[str, Any] = plain(cfg)
    parts = {part: config[part] for part in TOWERS if isinstance(config.get(part), dict)}
    for key, value in leaves(parts, deep=True):
        if key.endswith(".path") and isinstance(value, str):
            yield key, value


def _copy_tower(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    share(*folder.glob("*"))

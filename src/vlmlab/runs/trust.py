"""Somebody's run folder as data: its configuration makes classes of this package, and others only with permission.

Free of torch: what a name stands for is read from the package's source, and nothing is imported for it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmlab.contracts.errors import CheckpointError, UserError, brief, unbuildable
from vlmlab.contracts.terminal import tell
from vlmlab.runs.environment import package_folder
from vlmlab.runs.folder import RunFolder
from vlmlab.runs.withheld import KEY, REFERENCE, fits, literal, present

PLUGINS = (
    *("adapter", "cache", "connector", "data", "encoder", "engine", "evaluate"),
    *("fusion", "lm", "logger", "mask", "model", "objective", "pair_head", "towers"),
)
"""Folders of the package whose classes a configuration may name."""

GENERATORS = "vlmlab.data.world."
"""Beginning of the modules whose functions it may name, too: they make words and touch no file."""

NOT_BUILT = ("callbacks", "logger")
"""Sections that nothing is made of but by the command that trains."""

PARTS = ("encoder", "connector", "lm", "mask", "fusion")
SECTIONS = ("collate", "data", "trainer", "budget", "evaluation", "recipe")

CARRIED = "carried"
"""Key of ``env.json`` of a run that was exported: keys of its towers -> where they are in its own folder."""

CACHE = "evaluate/features"
"""In the run folder: features, where the cache that a saved configuration names is none on this machine."""


@cache
def source_of(target: str) -> tuple[ast.Module, ast.ClassDef | ast.FunctionDef] | None:
    """The parsed file of a class or function of this package, and that in it; None of anything else."""
    module, _, name = target.rpartition(".")
    package, *rest = module.split(".")
    file = package_folder().joinpath(*rest).with_suffix(".py") if all(map(str.isidentifier, rest)) and rest else Path()
    if package != package_folder().name or not file.is_file():
        return None
    parsed = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = (node for node in parsed.body if isinstance(node, kinds) and node.name == name)
    return next(((parsed, node) for node in found), None)


def saved_config(folder: Path, trust: bool = False) -> DictConfig:
    """The configuration of a run that is there, to build from: values, and classes of this package.

    A text in it is a text: nothing refers to anything, but for variables of the environment that have the value here
    that the run was made with.

    Args:
        folder: the run's.
        trust: make what it names from elsewhere, too, and take variables as they are here; that is printed.

    Raises:
        UserError: there is no run; or, without `trust`, it names something that this package did not define.
        CheckpointError: it is damaged.
    """
    run = RunFolder(folder)
    config = run.config()
    if config is None:
        raise UserError(f"{folder} is not a run folder (it has no config.yaml); give the folder that training printed")
    file = folder / "config.yaml"
    _check_whole(file, config)
    built = {key: value for key, value in config.items() if key not in NOT_BUILT}
    foreign = [(key, target) for key, target in named(built) if not is_ours(target)]
    if foreign and not trust:
        key, target = foreign[0]
        more = f" (and {len(foreign) - 1} more)" if foreign[1:] else ""
        raise UserError(
            f"{brief(str(file), 90)}: {brief(key, 60)}={brief(str(target), 50)}{more} is code from outside vlmlab and "
            "is not run; trust=true runs it, if you know who made this folder"
        )
    if foreign:
        made = ", ".join(f"{key}={target}" for key, target in foreign)
        tell(f"note: trust=true: {file} runs code from outside vlmlab: {brief(made, 600)}", sys.stderr)
    kept: list[str] = []
    cfg = OmegaConf.create(_opened(config, run.env().get(KEY) or {}, trust, "", kept))
    if kept:
        tell(f"note: {file}: {kept[0]}; it stays as it is written, trust=true takes what is set here", sys.stderr)
    for key, place in (run.env().get(CARRIED) or {}).items():
        if OmegaConf.select(cfg, key) is not None and (inside := _inside(folder, place)) is not None:
            OmegaConf.update(cfg, key, str(inside))
    _keep_features_inside(cfg, folder)
    return cfg


def _inside(folder: Path, place: Any) -> Path | None:
    """A folder in the run's own, wherever that is now."""
    found = (folder / str(place)).resolve()
    return found if found.is_dir() and found.is_relative_to(folder.resolve()) else None


def named(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration that names a class or function, and what it names."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{where}.{key}" if where else str(key)
        is_module = key == "module" and where.startswith("recipe.stages.") and not isinstance(value, Mapping)
        if key == "_target_" or is_module:
            yield here, value
        yield from named(value, here)


def is_ours(target: Any) -> bool:
    """Whether this is the name of a class in the folders of plug-ins, where it is defined, or of a generator."""
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 3 or parts[0] != package_folder().name or parts[1] not in PLUGINS:
        return False
    found = source_of(target)
    return found is not None and (isinstance(found[1], ast.ClassDef) or target.startswith(GENERATORS))


def _check_whole(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration from which no run can have been trained.

    Raises:
        CheckpointError: naming the key.
    """
    for key in (*SECTIONS, *PARTS):
        node = config.get(key)
        if not isinstance(node, Mapping) or (key in PARTS and "_target_" not in node):
            raise CheckpointError(f"{file} is damaged (its {key} is none); {RunFolder.REMEDY}")


def _opened(node: Any, known: Mapping[str, Any], trust: bool, where: str, kept: list[str]) -> Any:
    """The values for OmegaConf: texts that refer to nothing, but variables that are as they were."""
    if isinstance(node, Mapping):
        return {key: _opened(value, known, trust, f"{where}{key}.", kept) for key, value in node.items()}
    if isinstance(node, list):
        return [_opened(value, known, trust, f"{where}{index}.", kept) for index, value in enumerate(node)]
    if not isinstance(node, str) or not REFERENCE.search(node):
        return literal(node) if isinstance(node, str) else node
    value = present(node)
    if value is not None and (trust or fits(known.get(where[:-1]), value)):
        return node
    kept.append(f"{where[:-1]} is {node}, and that is not set here to what the run was made with")
    return literal(node)


def _keep_features_inside(cfg: DictConfig, folder: Path) -> None:
    """Keep features in the run folder where the folder that is named for them is not a cache of this machine."""
    named_folder = OmegaConf.select(cfg, "cache.folder")
    if named_folder is None:
        return
    from vlmlab.cache.shelf import SUFFIX

    there = Path(str(named_folder)).expanduser()
    if there.is_dir() and any(path.name.endswith(SUFFIX) for path in there.iterdir()):
        OmegaConf.update(cfg, "cache.max_gb", None)  # a limit from elsewhere removes no features here
    else:
        OmegaConf.update(cfg, "cache.folder", str(folder / CACHE))


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """What cannot be built from a saved configuration is refused in one sentence; only building belongs in here.

    Raises:
        CheckpointError: for whatever hydra, omegaconf or a value of another type say.
    """
    try:
        yield
    except InstantiationException as error:
        raise CheckpointError(f"{folder / 'config.yaml'}: {brief(unbuildable(error), 220)}") from error
    except (OmegaConfBaseException, TypeError, ValueError, KeyError, AttributeError) as error:  # of a value's type
        why = brief(" ".join(f"{type(error).__name__}: {error}".split()), 100)
        raise CheckpointError(f"{folder / 'config.yaml'} is damaged ({why}); {RunFolder.REMEDY}") from error

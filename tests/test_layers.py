"""Who may import whom: downwards only, and no plug-in another plug-in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vlmlab"
CHOICES = ("encoder", "connector", "lm", "mask", "fusion", "objective", "adapter")
"""Config groups whose choices are plug-ins of the folder of the same name."""
RANKS = (
    {"contracts"},
    {"data", "recipe", "runs", "cache", "digest", "towers"},
    {"encoder", "connector", "lm", "mask", "fusion", "objective", "adapter"},
    {"model"},
    {"engine", "towers.rebuild"},
    {"train", "evaluate", "analyse"},
    {"loading", "export", "inspect", "plan"},
    {"cli", "__init__"},
)
"""From the bottom up; a folder or module imports its own rank and those below it. A new one has to be given a place.
A module that stands higher than its folder is named with it."""
RANK = {name: place for place, names in enumerate(RANKS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in the file, and all that it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def rank(name: str) -> int:
    """The place of a dotted name inside the package."""
    parts = name.split(".")
    return RANK.get(".".join(parts[:2]), RANK[parts[0]])


def plugins() -> list[str]:
    """Modules that a config group names as the target of one of its choices."""
    found = set()
    for group in CHOICES:
        for path in (ROOT / "conf" / group).rglob("*.yaml"):
            words = re.findall(r"_target_:\s*(vlmlab\.[\w.]+)\.\w+", path.read_text(encoding="utf-8"))
            found |= {word for word in words if word.split(".")[1] in CHOICES}
    return sorted(found)


@pytest.mark.parametrize("plugin", plugins())
def test_no_plugin_imports_another(plugin: str) -> None:
    path = ROOT / "src" / Path(*plugin.split(".")).with_suffix(".py")
    others = set(plugins()) - {plugin}
    assert not others & set(imports(path)), "share it in a module that is no plug-in"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path: Path) -> None:
    own = rank(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    taken = {name.removeprefix("vlmlab.") for name in imports(path) if name.startswith("vlmlab.")}
    assert not {name for name in taken if rank(name) > own}

"""Who may import whom: downwards only, and no plug-in another plug-in."""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vlmlab"
FILES = sorted(PACKAGE.rglob("*.py"))
CHOICES = ("encoder", "connector", "lm", "mask", "fusion", "objective", "adapter", "recipe")
"""Config groups whose choices are plug-ins: of the folder of the same name, or of the engine for a recipe's stages."""
RANKS = (
    {"contracts"},
    {"data", "recipe", "runs", "cache", "digest", "towers", "logger"},
    {"encoder", "connector", "lm", "mask", "fusion", "objective", "adapter", "pair_head"},
    {"model"},
    {"engine"},
    {
        "plan",
        "inspect",
        "evaluate",
        "analyse",
        "loading",
        "demo",
        "export",
        "published",
        "towers.rebuild",
        "towers.text_export",
        "towers.pair_export",
        "towers.probes",
    },
    {"train", "harness"},
    {"cli", "__init__"},
)
"""From the bottom up; a folder or module imports its own rank and those below it. A new one has to be given a place.
A module that is higher than its folder is named with it."""
RANK = {name: place for place, names in enumerate(RANKS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in the file, and all that it takes from them."""
    ahead: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in ahead:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        ahead.extend(ast.iter_child_nodes(node))


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = {".".join(("vlmlab", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere, also for the type checker's sake alone."""
    taken = modules().keys() & set(imports(path))
    folders = {name for name in taken if any(other.startswith(name + ".") for other in taken)}
    return taken - folders  # ``from vlmlab.engine import rng`` takes the module, the folder is only passed through


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """One circle for every knot of modules that reach each other, from its first module in the alphabet."""
    seen: set[str] = set()
    for start in sorted(graph):
        way: dict[str, str] = {}  # module -> the one that imports it on the shortest way from here
        ahead = deque([start])
        while start not in way and ahead:
            module = ahead.popleft()
            fresh = sorted(graph[module] - way.keys())
            way |= dict.fromkeys(fresh, module)
            ahead.extend(fresh)
        if start in way and start not in seen:
            circle = [way[start]]
            while circle[-1] != start:
                circle.append(way[circle[-1]])
            seen |= set(circle)
            yield circle[::-1]


def rank(name: str) -> int:
    """The place of a dotted name inside the package."""
    parts = name.split(".")
    return RANK.get(".".join(parts[:2]), RANK[parts[0]])


def plugins() -> list[str]:
    """Modules that a config group names as the target of one of its choices."""
    found = set()
    for group in (*CHOICES, "memory_mask", "pair_head", "text_tower"):
        for path in (ROOT / "conf" / group).rglob("*.yaml"):
            words = re.findall(r"(?:_target_|module):\s*(vlmlab\.[\w.]+)\.\w+", path.read_text(encoding="utf-8"))
            found |= {word for word in words if word.split(".")[1] in (*CHOICES, "engine", "pair_head")}
    return sorted(found)


@pytest.mark.parametrize("plugin", plugins())
def test_no_plugin_imports_another(plugin: str) -> None:
    path = ROOT / "src" / Path(*plugin.split(".")).with_suffix(".py")
    others = set(plugins()) - {plugin}
    assert not others & set(imports(path)), "share it in a module that is not a plug-in"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path: Path) -> None:
    own = rank(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    taken = {name.removeprefix("vlmlab.") for name in imports(path) if name.startswith("vlmlab.")}
    assert not {name for name in taken if rank(name) > own}


@pytest.mark.parametrize("folder", ["recipe", "data"])
def test_what_a_recipe_says_and_where_samples_come_from_know_the_contracts_alone(folder: str) -> None:
    taken = {name for path in (PACKAGE / folder).rglob("*.py") for name in imports(path) if name.startswith("vlmlab.")}
    assert {name.split(".")[1] for name in taken} <= {"contracts", folder}


def test_no_file_imports_itself_by_way_of_others() -> None:
    found = list(circles({name: imported(path) for name, path in modules().items()}))
    assert not found, "\n".join(" -> ".join([*circle, circle[0]]) for circle in found)


def test_a_circle_is_found_where_there_is_one() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})) == [["b", "c"]]

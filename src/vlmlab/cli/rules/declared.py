"""What a plug-in says of itself, read from its source, since importing it would import torch."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

from vlmlab.runs.trust import source_of


def declared(target: str, name: str) -> Any:
    """What a class of this package, or one of ours that it inherits from, assigns to an attribute in its body.

    It is read from the source, since importing the class imports torch.

    Args:
        target: dotted path of the class.
        name: of the attribute.

    Returns:
        The constant, or a list or mapping of constants; None where the class is not ours or says nothing of the kind.
    """
    for kind in _lineage(target):
        for line in kind.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            value = getattr(line, "value", None)
            if value is not None and name in [getattr(t, "id", None) for t in targets]:
                with contextlib.suppress(ValueError):  # computed
                    return ast.literal_eval(value)
    return None


def offers(target: str, method: str) -> bool | None:
    """Whether a class of this package, or one of ours that it inherits from, has a method; None for a foreign class.

    Args:
        target: dotted path of the class.
        method: its name.
    """
    if source_of(target) is None:
        return None
    return any(isinstance(line, ast.FunctionDef) and line.name == method for k in _lineage(target) for line in k.body)


def _lineage(target: str) -> Iterator[ast.ClassDef]:
    """A class of this package and those of ours that it inherits from, itself first."""
    found = source_of(target)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return
    yield found[1]
    for base in bases_of(target):
        yield from _lineage(base)


def bases_of(target: str) -> list[str]:
    """Dotted paths of what a class of this package inherits from, itself left out."""
    found = source_of(target)
    if found is None:
        return []
    module, kind = found
    if not isinstance(kind, ast.ClassDef):
        return []
    here = target.rpartition(".")[0]
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in module.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return [origin.get(base.id, f"{here}.{base.id}") for base in kind.bases if isinstance(base, ast.Name)]


def inherits(target: str, base: str) -> bool:
    """Whether a class of this package is another one or comes from it."""
    return target == base or any(inherits(parent, base) for parent in bases_of(target))

"""Which keys a class takes and of which types: its constructor, read from its source where the class is ours.

Importing one of our classes imports torch, so that its annotations are evaluated by themselves: names of ``typing``,
of ``vlmlab.contracts.values`` and aliases of a module count as what they are, any other class as a part that the
configuration describes by ``_target_``. Classes from elsewhere are imported and asked.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra._internal.utils import _locate  # get_object of its public utils also logs

from vlmlab.cli.rules.declared import bases_of
from vlmlab.contracts.values import part
from vlmlab.runs.environment import package_folder
from vlmlab.runs.trust import source_of

PLAIN = ("typing", "collections.abc", "annotated_types", "vlmlab.contracts.values")
"""Modules that are imported for an annotation; they import nothing heavy."""


@dataclass
class Constructor:
    """What a class is made from.

    Attributes:
        types: annotation of every keyword, ``Any`` where there is none.
        needed: keywords without a default.
        open: whether it takes any others.
    """

    types: dict[str, Any] = field(default_factory=dict)
    needed: list[str] = field(default_factory=list)
    open: bool = False

    def beside(self, base: Constructor) -> Constructor:
        """Itself, whose ``**kwargs`` go to that of a base."""
        own = {key: kind for key, kind in base.types.items() if key not in self.types}
        return Constructor({**self.types, **own}, self.needed + [key for key in base.needed if key in own], base.open)


@cache
def constructor(target: str) -> Constructor:
    """The keys of a class or function.

    Args:
        target: its dotted path.

    Raises:
        ImportError: it is not there, or is nothing that can be called.
    """
    return _from_source(target) if source_of(target) is not None else _from_class(target)


# -- ours, from the source -------------------------------------------------------------------------------------------


def _from_source(target: str) -> Constructor:
    found = source_of(target)
    if found is None:
        return Constructor(open=True)
    module, node = found
    names = _Names(target.rpartition(".")[0], module)
    if isinstance(node, ast.FunctionDef):
        return _of_arguments(node.args, names, skip=0)
    init = next((line for line in node.body if isinstance(line, ast.FunctionDef) and line.name == "__init__"), None)
    if init is None and any(ast.unparse(line).startswith("dataclass") for line in node.decorator_list):
        return _of_fields(node, names)
    inherited = (_from_source(base) for base in bases_of(target))
    if init is None:
        return next((base for base in inherited if base.types), Constructor())
    own = _of_arguments(init.args, names, skip=1)
    return own.beside(next(inherited, Constructor(open=True))) if init.args.kwarg else own


def _of_arguments(args: ast.arguments, names: _Names, skip: int) -> Constructor:
    plain = [*args.posonlyargs, *args.args][skip:]
    without = len(plain) - len(args.defaults)
    needed = [arg.arg for arg in plain[: max(0, without)]]
    needed += [arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    return Constructor({arg.arg: names.type_of(arg.annotation) for arg in [*plain, *args.kwonlyargs]}, needed)


def _of_fields(node: ast.ClassDef, names: _Names) -> Constructor:
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    own = [line for line in lines if "ClassVar" not in ast.unparse(line.annotation)]
    kinds = {line.target.id: names.type_of(line.annotation) for line in own if isinstance(line.target, ast.Name)}
    return Constructor(kinds, [str(ast.unparse(line.target)) for line in own if line.value is None])


class _Names(dict[str, Any]):
    """What the names in a module's annotations stand for, without importing the module."""

    def __init__(self, name: str, module: ast.Module) -> None:
        super().__init__()
        self.name, self.module = name, module

    def type_of(self, annotation: ast.expr | None) -> Any:
        """The type that an annotation says; ``Any`` where it says none that is known here."""
        if annotation is None:
            return Any
        try:
            return eval(compile(ast.Expression(annotation), self.name, "eval"), {"__builtins__": {}}, self)
        except (AttributeError, TypeError, NameError):  # a class that is reached through its module, as nn.Module
            return Any

    def __missing__(self, name: str) -> Any:
        self[name] = self._found(name)
        return self[name]

    def _found(self, name: str) -> Any:
        for line in self.module.body:
            if isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in line.targets):
                return self.type_of(line.value)
            if isinstance(line, ast.ImportFrom) and line.module:
                for alias in line.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(line.module, alias.name)
        plain = getattr(builtins, name, None)
        return plain if isinstance(plain, type) else part(name)

    def _imported(self, module: str, name: str) -> Any:
        if module in PLAIN:
            return getattr(importlib.import_module(module), name)
        file = package_folder().parent.joinpath(*module.split(".")).with_suffix(".py")
        if not module.startswith(f"{package_folder().name}.") or not file.is_file():
            return part(name)
        return _Names(module, ast.parse(file.read_text(encoding="utf-8")))[name]


# -- of others, from the class ---------------------------------------------------------------------------------------


def _from_class(target: str) -> Constructor:
    try:
        found = _locate(target)
    except Exception as error:  # whatever its module does when it is imported
        raise ImportError(str(error.__cause__ or error)) from error
    if not callable(found):
        raise ImportError(f"it is a {type(found).__name__}, not a class")
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):  # written in C
        return Constructor(open=True)
    try:
        made_by: Any = vars(found).get("__init__", found) if isinstance(found, type) else found
        kinds = get_type_hints(made_by, include_extras=True)
    except Exception:  # an annotation that cannot be evaluated; the others do not count then
        kinds = {}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Constructor(
        {p.name: kinds.get(p.name, Any) if _is_plain(kinds.get(p.name, Any)) else Any for p in named},
        [p.name for p in named if p.default is p.empty],
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _is_plain(kind: Any) -> bool:
    """Whether a type is made of what a configuration can hold, and not of somebody's classes."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return True
    if hasattr(kind, "__metadata__"):  # Annotated
        return _is_plain(inner[0])
    if origin in (Union, types.UnionType) or (isinstance(origin, type) and issubclass(origin, Sequence | Mapping)):
        return origin is not tuple and all(map(_is_plain, inner))
    return kind in (int, float, str, bool, types.NoneType, Any)


def keys_in(target: str) -> Iterator[str]:
    """The keys of a class, none where it cannot be asked."""
    try:
        yield from constructor(target).types
    except ImportError:
        return

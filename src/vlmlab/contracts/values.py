"""What values a key may have: the types that annotations of constructors are made of, and what refuses a wrong one.

A constructor's annotation is the schema of its YAML, as in ``depth: Depth = 2`` or ``norm: Literal["layer", "rms"]``;
pydantic checks it, strictly: true is not a number, 3 is not a text, NaN and infinities are refused. Never imports
torch.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Collection, Mapping, Sequence
from functools import cache, reduce
from operator import or_
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from annotated_types import Ge, Gt, Interval, Le, Len, Lt, MinLen

from vlmlab.contracts.errors import listed

MOST = 10**9
"""Largest count; a refusal names a smaller limit, and this one only beyond it."""

Count = Annotated[int, Interval(ge=1, le=MOST)]
Natural = Annotated[int, Interval(ge=0, le=MOST)]
Depth = Annotated[int, Interval(ge=1, le=1000)]
"""Layers, of which a wrong number takes for ever."""

Width = Annotated[int, Interval(ge=1, le=100_000)]
"""Channels, heads, tokens: what a weight is as long as; two of the longest make a matrix of 40 GB."""

Vocabulary = Annotated[int, Interval(ge=1, le=1_000_000)]
"""Words of a table of embeddings."""

Index = Annotated[int, Interval(ge=-1000, le=1000)]
"""A layer; negative ones count from the last."""

Layers = Annotated[Sequence[Index], MinLen(1)]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Drop = Annotated[float, Interval(ge=0, lt=1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
"""Learning rates, weights of losses, seconds."""

Text = Annotated[str, MinLen(1)]
Texts = Sequence[Text]
Names = Annotated[Sequence[Text], MinLen(1)]
Pixels = Annotated[int, Interval(ge=1, le=100_000)]
Size = Pixels | Annotated[Sequence[Pixels], Len(2, 2)]
"""Of an image: one side of a square, or rows and columns."""

Levels = Literal["auto"] | Annotated[Sequence[float], Len(2, 2)]
"""Black and white of an image."""

Dtype = Literal["float32", "bfloat16", "float16"]
Wrapped = Annotated[Sequence[Literal["lm", "encoder", "connector", "fusion"]], MinLen(1)]
"""What an adapter wraps."""


CHOSEN = {
    "Encoder": "encoder",
    "Connector": "connector",
    "CausalLanguageModel": "lm",
    "Fusion": "fusion",
    "Mask": "mask",
    "MemoryMask": "memory_mask",
    "Adapter": "adapter",
    "Objective": "objective",
    "PairHead": "pair_head",
}
"""Groups of ``conf/`` whose files are of a contract."""


class Part:
    """Marks in an annotation what the configuration describes by ``_target_``.

    Args:
        kind: its contract, as in ``Encoder``.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.group = kind, CHOSEN.get(kind)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """A mapping with ``_target_``."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(_described)

    def __hash__(self) -> int:
        return hash(self.kind)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and other.kind == self.kind


def _described(value: Any) -> Any:
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str) or not value["_target_"]:
        raise ValueError
    return value


def part(kind: str) -> Any:
    """The annotation of something that the configuration describes by ``_target_``."""
    return Annotated[Mapping[str, Any], Part(kind)]


@cache
def _adapter(annotation: Any) -> Any:
    """Pydantic's validator; imported here, since a quarter of a second is a lot for who only wants a type."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def refusal(annotation: Any, value: Any, key: str) -> str | None:
    """What is wrong with a value, and what to give instead; None for a good one.

    Args:
        annotation: the type of the key, with its range. A ``TypedDict`` is a mapping whose keys are looked at one by
            one: others are refused, unless it is ``total=False``, whose others may have any value.
        value: as the configuration has it, resolved.
        key: its dotted name.
    """
    members = _members(annotation)
    section = next((member for member in members if is_typeddict(_bare(member))), None)
    if section is not None and (isinstance(value, Mapping) or len(members) == 1):
        return _section_refusal(section, value, key)
    of = next((inner for member in members if (inner := _values_of(member)) is not None), None)
    if of is not None and isinstance(value, Mapping) and value:
        if "_target_" in value and any(_part_of(member) for member in members):
            given = value["_target_"]
            named = isinstance(given, str) and given
            return None if named else f"{key}._target_={shown(given)} is not a class; give its dotted path"
        found = (refusal(of, inner, f"{key}.{name}") for name, inner in value.items())
        return next((sentence for sentence in found if sentence is not None), None)
    return _plain_refusal(annotation, value, key)


def _plain_refusal(annotation: Any, value: Any, key: str) -> str | None:
    from pydantic import ValidationError

    plain = [_without_values(member) for member in _members(annotation)]
    pair = get_origin(annotation) is tuple and isinstance(value, list)
    try:
        _adapter(reduce(or_, plain)).validate_python(tuple(value) if pair else value)
    except ValidationError:
        if isinstance(value, Mapping) and "_target_" in value and any(map(_part_of, _members(annotation))):
            return f"{key}._target_={shown(value['_target_'])} is not a class; give its dotted path"
        group = next((fact.group for member in _members(annotation) if (fact := _part_of(member))), None)
        if group is not None and isinstance(value, str):
            article = "an" if group[0] in "aeiou" else "a"
            return (
                f"{key}={shown(value)} is not {article} {group.replace('_', ' ')}; write {group}@{key}={shown(value)}"
            )
        known = _words(annotation)
        if known is not None:
            return f"{key}={shown(value)} is unknown; choose one of {', '.join(known)}"
        return f"{key}={shown(value)} is not possible; give {said(annotation, value)}"
    return None


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _values_of(annotation: Any) -> Any:
    """X of ``Mapping[str, X]``; None for any other type."""
    bare = _bare(annotation)
    origin, inner = get_origin(bare), get_args(bare)
    return inner[1] if isinstance(origin, type) and issubclass(origin, Mapping) and inner[1] is not Any else None


def _without_values(annotation: Any) -> Any:
    """A mapping of anything in place of one whose values are looked at one by one; pydantic is asked for the rest."""
    if not is_typeddict(_bare(annotation)) and _values_of(annotation) is None:
        return annotation
    facts = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return Annotated[(Mapping[str, Any], *facts)] if facts else Mapping[str, Any]


def _part_of(annotation: Any) -> Part | None:
    """The part that an annotation says, if it says one."""
    facts = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((fact for fact in facts if isinstance(fact, Part)), None)


def _section_refusal(section: Any, value: Any, where: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{where}={shown(value)} is not possible; its keys are {listed(hints(section))}"
    known, dot = hints(section), f"{where}." if where else ""
    for key in needed(section):
        if key not in value:
            return f"{dot}{key} is not in the configuration and a run needs it; do not take it out by ~"
    for key, inner in value.items():
        if key in known and (sentence := refusal(known[key], inner, f"{dot}{key}")) is not None:
            return sentence
    return None


@cache
def hints(described: Any) -> dict[str, Any]:
    """The annotations of a class with their ranges."""
    found = get_type_hints(described, include_extras=True)
    return {key: get_args(kind)[0] if get_origin(kind) is NotRequired else kind for key, kind in found.items()}


@cache
def needed(section: Any) -> tuple[str, ...]:
    """The keys that a section must have (``__required_keys__`` does not know postponed annotations)."""
    found = get_type_hints(section, include_extras=True) if section.__total__ else {}
    return tuple(key for key, kind in found.items() if get_origin(kind) is not NotRequired)


def nearest(word: str, known: Collection[str], prefix: str = "") -> str:
    """`` (did you mean x?)``, or nothing where no word is near."""
    close = difflib.get_close_matches(word, [*known], n=1, cutoff=0.6)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def shown(value: Any, most: int = 60) -> str:
    """A value as on the command line, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, separators=(",", ":"))
    return text if len(text) <= most else text[: most - 3] + "..."


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _words(annotation: Any) -> list[str] | None:
    """The choices, where an annotation has nothing but choices."""
    words: list[str] = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            words += [shown(word) for word in get_args(member)]
        elif member in (None, types.NoneType):
            words.append("null")
        else:
            return None
    return words


def said(annotation: Any, value: Any = None) -> str:
    """A type in words: ``a whole number of at least 1, or null``."""
    members = _members(annotation)
    if len(members) > 1:
        words = [said(member, value) for member in members]
        return ", ".join(words[:-1]) + f", or {words[-1]}"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if (part_of := _part_of(annotation)) is not None:
            return f"a part ({part_of.kind}) with its _target_"
        return said(inner[0], value) + _range(inner[1:], value)
    if origin is Literal:
        return " or ".join(shown(word) for word in inner)
    if annotation in (None, types.NoneType):
        return "null"
    if origin is tuple:
        return f"a list of {len(inner)}, as in [a,b], each {said(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping, as in '{a: ...}'"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, as in [a,b], each {said(inner[0])}" if inner else "a list, as in [a,b]"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(annotation, "a mapping, as in '{a: ...}'")


def _range(facts: Sequence[Any], value: Any) -> str:
    """Limits in words."""
    low = high = above = below = None
    for fact in facts:
        if isinstance(fact, Len):
            return f"; exactly {fact.min_length} of them" if fact.max_length == fact.min_length else ", not empty"
        if isinstance(fact, MinLen):
            return ", not empty"
        low = getattr(fact, "ge", None) if isinstance(fact, Interval | Ge) else low
        above = getattr(fact, "gt", None) if isinstance(fact, Interval | Gt) else above
        high = getattr(fact, "le", None) if isinstance(fact, Interval | Le) else high
        below = getattr(fact, "lt", None) if isinstance(fact, Interval | Lt) else below
    beyond = isinstance(value, int | float) and value > MOST
    if low is not None and high is not None and (high != MOST or beyond):
        return f" from {low} to {high}"
    parts = [f"of at least {low}" if low is not None else "", f"above {above}" if above is not None else ""]
    parts += [f"below {below}" if below is not None else "", f"of at most {high}" if high not in (None, MOST) else ""]
    limits = [text for text in parts if text]
    return f" {' and '.join(limits)}" if limits else ""


class Rope(TypedDict, total=False):
    """``rope_parameters`` of a ``config.json``."""

    rope_type: Text
    rope_theta: Positive
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count


class TowerSizes(TypedDict, total=False):
    """What a ``config.json`` says of one tower; keys that are not here may have any value."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Depth
    num_attention_heads: Width
    num_key_value_heads: Width
    head_dim: Width
    projection_dim: Width
    max_position_embeddings: Count
    image_size: Pixels
    patch_size: Pixels
    sliding_window: Count | None
    pad_token_id: Natural | None
    mlp_ratio: Positive
    rms_norm_eps: Positive
    layer_norm_eps: Positive
    rope_theta: Positive
    rope_parameters: Rope
    hidden_act: Text
    hidden_activation: Text
    tie_word_embeddings: bool


class Architecture(TowerSizes, total=False):
    """``model_type`` and the keys of a ``config.json`` that differ from that type's defaults."""

    model_type: Text
    vision_config: TowerSizes
    text_config: TowerSizes

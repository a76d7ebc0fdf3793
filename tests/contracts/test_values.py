"""What is refused as a value, by type and by range, and how it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from vlmlab.contracts.values import (
    Architecture,
    Count,
    Drop,
    Layers,
    NotNegative,
    Part,
    Positive,
    Seed,
    Share,
    Size,
    Text,
    Texts,
    Width,
    refusal,
)

NAN, INF = float("nan"), float("inf")
GOOD: list[tuple[Any, Any]] = [
    (Count, 1),
    (Count | None, None),
    (Seed, 2**32 - 1),
    (Share, 0),
    (Share, 1.0),
    (Drop, 0.5),
    (Positive, 1),
    (NotNegative, 0.0),
    (bool, True),
    (Text | Texts, ["a"]),
    (Literal["auto"] | bool, False),
    (Size, [2, 3]),
    (Layers | None, [-2, 1]),
    (tuple[Drop, Drop], [0.9, 0.95]),
    (Architecture | None, {"model_type": "llama", "hidden_size": 8, "anything": [1]}),
    (Mapping[str, Any], {}),
    (float, -3),
]
WRONG: list[tuple[Any, Any, str]] = [
    *((Count, value, "give a whole number of at least 1") for value in (0, -1, 1.0, 1.5, True, "1", None, [], {}, NAN)),
    (Count, 10**12, "give a whole number from 1 to 1000000000"),
    (Width | None, 0, "give a whole number from 1 to 100000, or null"),
    *((Positive, value, "give a number above 0") for value in (0, -1, NAN, INF, -INF, True, "x", None, [1])),
    *((Share, value, "give a number from 0 to 1") for value in (-0.1, 1.1, NAN, True)),
    (Drop, 1, "give a number of at least 0 and below 1"),
    *((bool, value, "give true or false") for value in (0, 1, "true", None)),
    *((Text, value, "give a text, not empty") for value in (3, "", None, ["a"], True)),
    *((Texts, value, "give a list") for value in ("a", [1], {"a": 1}, [""])),
    (Literal["a", "b"] | None, "c", "is unknown; choose one of a, b, null"),
    (Literal["auto"] | bool, 1, "give auto, or true or false"),
    (Layers, [], "give a list, as in [a,b]"),
    (Layers, [True], "give a list"),
    (Size, [1, 2, 3], "exactly 2 of them"),
    (tuple[Drop, Drop], [0.9], "give a list of 2"),
    (tuple[Drop, Drop], [0.9, "a"], "give a list of 2"),
    (Architecture | None, {"hidden_size": -1}, "key.hidden_size=-1 is not possible"),
    (Architecture | None, {"rope_parameters": {"rope_theta": NAN}}, "key.rope_parameters.rope_theta=NaN is"),
    (Architecture | None, 3, "give a mapping"),
    (Annotated[Mapping[str, Any], Part("MemoryMask")], "latest", "is not a memory mask; write memory_mask@key=latest"),
    (Annotated[Mapping[str, Any], Part("Thing")], {"a": 1}, "give a part (Thing) with its _target_"),
    (Annotated[Mapping[str, Any], Part("Thing")], {"_target_": 3}, "key._target_=3 is not a class"),
]


@pytest.mark.parametrize(("annotation", "value"), GOOD)
def test_a_good_value_passes(annotation: Any, value: Any) -> None:
    assert refusal(annotation, value, "key") is None


@pytest.mark.parametrize(("annotation", "value", "words"), WRONG)
def test_a_wrong_value_is_refused_by_its_key(annotation: Any, value: Any, words: str) -> None:
    said = refusal(annotation, value, "key")
    assert said is not None and said.startswith("key") and words in said and len(said) <= 300


class Inner(TypedDict):
    size: Count
    note: NotRequired[Text]


class Outer(TypedDict):
    inner: Inner
    several: Mapping[str, Inner | None]
    sizes: Sequence[Count]


def test_a_section_is_looked_at_key_by_key() -> None:
    good: dict[str, Any] = {"inner": {"size": 1}, "several": {"a": {"size": 1, "note": "x"}, "b": None}, "sizes": [1]}
    assert refusal(Outer, good, "") is None
    for changes, words in (
        ({"inner": {}}, "inner.size is not in the configuration"),
        ({"inner": 3}, "inner=3 is not possible; its keys are size, note"),
        ({"inner": {"size": 1, "note": 2}}, "inner.note=2 is"),
        ({"several": {"a": {"size": 0}}}, "several.a.size=0 is"),
        ({"several": []}, "several=[] is not possible; give a mapping"),
        ({"sizes": [0]}, "sizes=[0] is"),
    ):
        assert str(refusal(Outer, good | changes, "")).startswith(words)


def test_a_long_value_is_cut() -> None:
    assert len(str(refusal(Count, "x" * 10_000, "key"))) < 150

from __future__ import annotations

from collections import Counter

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.mixture import Mixture


class Named:
    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.skipped = [f"{name}!"]

    def __len__(self) -> int:
        return self.size

    def label(self, index: int) -> str:
        return f"{self.name}{index}"

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.name}{range(self.size)[index]}", (), (Turn("q", "a"),))


def ids(source: Mixture) -> list[str]:
    return [source[i].id for i in range(len(source))]


def test_without_weights_every_sample_comes_once() -> None:
    mixed = Mixture([Named("a", 5), Named("b", 12)])
    assert sorted(ids(mixed)) == sorted([f"a{i}" for i in range(5)] + [f"b{i}" for i in range(12)])
    assert (
        ids(mixed)
        == ids(Mixture([Named("a", 5), Named("b", 12)]))
        != ids(Mixture([Named("a", 5), Named("b", 12)], seed=1))
    )
    assert mixed.skipped == ["a!", "b!"] and mixed.label(0) == mixed[0].id
    assert mixed.turns(0) == mixed[0].turns and not mixed.turns_in_memory


def test_weights_are_met_exactly_and_passes_are_whole() -> None:
    found = ids(Mixture([Named("a", 4), Named("b", 1000)], weights=[3, 1], size=40))
    counts = Counter(name[0] for name in found)
    assert counts == {"a": 30, "b": 10}
    each = Counter(name for name in found if name[0] == "a")
    assert set(each.values()) == {7, 8} and len(each) == 4
    assert len({name for name in found if name[0] == "b"}) == 10
    assert max(int(name[1:]) for name in found if name[0] == "b") > 40  # not its first rows
    thirds = Counter(name[0] for name in ids(Mixture([Named(n, 9) for n in "abc"], [1, 1, 1], 10)))
    assert sorted(thirds.values()) == [3, 3, 4]
    assert set(ids(Mixture([Named("a", 4), Named("b", 4)], [0, 1]))) == {f"b{i}" for i in range(4)}


BAD: list[tuple[list[int], list[float] | None, int | None]] = [
    ([], None, None),
    ([3, 0], None, None),
    ([3, 3], [1], None),
    ([3, 3], [0, 0], None),
    ([3], [-1], None),
    ([3], None, 0),
]


@pytest.mark.parametrize(("sizes", "weights", "size"), BAD)
def test_impossible_mixtures(sizes: list[int], weights: list[float] | None, size: int | None) -> None:
    with pytest.raises(UserError):
        Mixture([Named("x", n) for n in sizes], weights, size)

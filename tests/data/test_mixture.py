from __future__ import annotations

from collections import Counter

import pytest

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.sample import Sample, Turn
from vlmlab.data.fingerprint import source_fingerprint
from vlmlab.data.mixture import Mixture, flattened
from vlmlab.data.world.sources import WorldCaptions


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


@pytest.mark.parametrize(("temperature", "wanted"), [(1.0, [10, 40, 250]), (2.0, [50, 100, 250]), (1e9, [100] * 3)])
def test_a_temperature_flattens_the_sizes(temperature: float, wanted: list[int]) -> None:
    """1: the sizes; 2: their square roots (InstructBLIP); a large one: equal shares."""
    sizes = [100, 400, 2500]
    shares = flattened(sizes, temperature)
    plain = [size ** (1 / temperature) for size in sizes]
    assert [s / sum(shares) for s in shares] == pytest.approx([p / sum(plain) for p in plain])
    total = sum(wanted)
    mixed = Mixture([Named(n, s) for n, s in zip("abc", sizes, strict=True)], size=total, temperature=temperature)
    found = Counter(name[0] for name in ids(mixed))
    assert [found[n] for n in "abc"] == pytest.approx(wanted, abs=1)


def test_a_temperature_of_one_is_no_temperature() -> None:
    """What ran before there was one is still the same mixture."""
    sources = [WorldCaptions("short", "train", n) for n in (30, 70)]
    before, now = Mixture(sources), Mixture(sources, temperature=1.0)
    assert source_fingerprint(before) == source_fingerprint(now)
    assert source_fingerprint(Mixture(sources, temperature=2.0)) != source_fingerprint(now)
    assert [now.turns(i) for i in range(9)] == [before.turns(i) for i in range(9)]


def test_a_temperature_beside_weights_or_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="give one of the two"):
        Mixture([Named("a", 3)], [1], temperature=2.0)
    with pytest.raises(UserError, match="positive"):
        Mixture([Named("a", 3)], temperature=0.0)

from collections import Counter

from vlmlab.data.world.stream import Stream, noise_bytes


def test_values_are_pinned_for_ever():
    stream = Stream("world-v1", "train", 0, "pin")
    assert [stream.below(1000) for _ in range(6)] == [769, 620, 618, 711, 15, 851]
    assert noise_bytes(4, "world-v1", 0).hex() == "027c6399"


def test_streams_differ_by_key_and_repeat():
    draw = lambda *key: [Stream(*key).below(1 << 60) for _ in range(1)]  # noqa: E731
    assert draw("a", 1) == draw("a", 1)
    assert draw("a", 1) != draw("a", 2)


def test_long_streams_do_not_repeat_chunks():
    stream = Stream("long")
    values = [stream.below(1 << 62) for _ in range(300)]
    assert len(set(values)) == 300


def test_weighted_follows_weights_and_never_takes_zero():
    stream = Stream("weights")
    found = Counter(stream.weighted((0.0, 1.0, 3.0)) for _ in range(8000))
    assert found[0] == 0
    assert abs(found[2] / 8000 - 0.75) < 0.02


def test_shuffled_is_a_uniform_permutation_and_leaves_its_argument():
    items = (0, 1, 2)
    stream = Stream("shuffle")
    found = Counter(tuple(stream.shuffled(items)) for _ in range(6000))
    assert items == (0, 1, 2)
    assert len(found) == 6
    assert all(abs(count / 6000 - 1 / 6) < 0.02 for count in found.values())


def test_chance_has_its_probability():
    stream = Stream("chance")
    assert abs(sum(stream.chance(0.15) for _ in range(10000)) / 10000 - 0.15) < 0.015

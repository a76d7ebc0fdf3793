from collections import Counter
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from vlmlab.contracts.errors import DataError
from vlmlab.data.module import Windows, step_loader
from vlmlab.data.sampler import Order


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60), rows=st.integers(1, 4), ranks=st.integers(1, 4), accumulate=st.integers(1, 4),
    step=st.integers(0, 12), seed=st.integers(0, 5),
)  # fmt: skip
def test_all_ranks_and_micro_batches_make_up_the_same_step(size, rows, ranks, accumulate, step, seed):
    order = Order(size, rows * ranks * accumulate, seed, "stage")
    shares = [order.share(step, rank, ranks, accumulate) for rank in range(ranks)]
    assert {len(share) for share in shares} == {accumulate}
    assert {len(micro) for share in shares for micro in share} == {rows}
    together = chain.from_iterable(chain.from_iterable(shares))
    assert Counter(together) == Counter(order.window(step)) == Counter(chain.from_iterable(order.share(step)))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 17), epochs=st.integers(1, 3))
def test_every_epoch_sees_every_sample_once(size, batch, epochs):
    order = Order(size, batch, 1, "stage")
    steps = -(-size * epochs // batch)
    seen = list(chain.from_iterable(order.window(step) for step in range(steps)))[: size * epochs]
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_order_depends_on_seed_stage_and_epoch_only():
    first = Order(100, 100, 0, "a")
    assert first.window(0) == Order(100, 100, 0, "a").window(0)
    others = [first.window(1), Order(100, 100, 1, "a").window(0), Order(100, 100, 0, "b").window(0)]
    assert all(other != first.window(0) for other in others)


def test_order_is_the_same_on_every_machine():
    assert Order(10, 10, 0, "align").window(0) == [9, 1, 7, 5, 6, 4, 0, 8, 3, 2]


class Numbers:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 13:
            raise DataError("row 13 is broken; mend it.")
        return index


def test_loader_starts_in_the_middle_and_workers_change_nothing():
    def steps(start, workers):
        windows = Windows(Numbers(), list, Order(12, 4, 0, "x"), steps=6, accumulate=2)
        return [(window.step, window.batches) for window in step_loader(windows, start, workers)]

    whole = steps(0, 0)
    assert [step for step, _ in whole] == list(range(6))
    assert steps(2, 0) == whole[2:]
    assert steps(2, 2) == whole[2:]


def test_a_broken_row_comes_back_whole_from_a_worker():
    windows = Windows(Numbers(), list, Order(20, 20, 0, "x"), steps=1)
    (window,) = step_loader(windows, workers=1)
    assert isinstance(window.error, DataError)
    assert str(window.error) == "row 13 is broken; mend it."


def test_what_is_read_in_order_is_shuffled_within_blocks():
    order, rows = Order(11, 11, 3, "stage", block=4), Order(11, 11, 3, "stage")
    passes = [order.window(epoch) for epoch in range(3)]
    for each in passes:
        assert [set(each[:4]), set(each[4:8]), set(each[8:])] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10}]
    assert len({tuple(each) for each in passes}) == 3 and passes[0] != list(range(11))
    assert Order(11, 11, 3, "stage", block=50).window(0)[0] in range(11)
    assert rows.window(1) == Order(11, 11, 3, "stage", block=11).window(1)

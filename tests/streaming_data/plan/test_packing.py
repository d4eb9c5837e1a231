"""Best fit decreasing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.packing import pack, split_packs

CAPACITY = 40
things = st.lists(st.integers(1, CAPACITY), max_size=120).map(lambda numbers: np.array(numbers, np.int64))


def sums(lengths: Integers, order: Integers, sizes: Integers) -> Integers:
    return np.add.reduceat(lengths[order], np.cumsum(sizes) - sizes) if len(sizes) else np.empty(0, np.int64)


@given(things)
@settings(deadline=None)
def test_packs_are_a_partition_and_none_is_too_long(lengths: Integers) -> None:
    order, sizes = pack(lengths, CAPACITY)
    assert np.sort(order).tolist() == list(range(len(lengths)))
    assert sizes.sum() == len(lengths)
    assert (sizes > 0).all()
    assert (sums(lengths, order, sizes) <= CAPACITY).all()


@given(things)
@settings(deadline=None)
def test_packs_are_those_of_best_fit_decreasing(lengths: Integers) -> None:
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(CAPACITY - length)
    order, sizes = pack(lengths, CAPACITY)
    assert sorted(CAPACITY - sums(lengths, order, sizes)) == sorted(room)


@given(things)
@settings(deadline=None)
def test_things_keep_their_order_inside_a_pack(lengths: Integers) -> None:
    order, sizes = pack(lengths, CAPACITY)
    for part in np.split(order, np.cumsum(sizes)[:-1]):
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("lengths", [[3, 41], [0, 3]])
def test_lengths_that_fit_no_pack_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="packs of 40"):
        pack(np.array(lengths), CAPACITY)


def test_packing_keeps_its_input_and_unsigned_lengths_dont_wrap() -> None:
    lengths = np.array([5, 40, 1], np.uint16)
    order, sizes = pack(lengths, CAPACITY)
    assert lengths.tolist() == [5, 40, 1]
    assert sorted(sizes.tolist()) == [1, 2]
    assert len(order) == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 60))
@settings(deadline=None)
def test_splitting_makes_exactly_as_many_packs_more_as_requested(sizes: list[int], more: int) -> None:
    array = np.array(sizes, np.int64)
    more = min(more, int(array.sum()) - len(array))
    split = split_packs(array, more)
    assert len(split) == len(array) + more
    assert split.sum() == array.sum()
    assert (split > 0).all()
    assert set(np.cumsum(array)) <= set(np.cumsum(split)), "packs are only cut, never joined"
    assert array.tolist() == sizes

"""Lengths -> packs: best fit decreasing, by classes of equal length. Pure, and the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.streaming_data.arrays import Integers


def pack(lengths: npt.NDArray[np.integer[Any]], capacity: int) -> tuple[Integers, Integers]:
    """Put items of `lengths` (n,), each from 1 to `capacity`, into packs of at most `capacity`.

    Exactly best fit decreasing: the longest item first, each into the fullest pack that still has room for
    it. Items of one length are interchangeable, and so are packs with the same room, so both move in whole
    groups, and the cost is that of the distinct lengths: 1 M samples of 16 to 4096 tokens take 0.13 s on one
    core in windows of 128 k.

    Returns:
        order (n,): the items, pack after pack, in each pack in the order in which they came.
        sizes (p,): how many items each pack holds; `sizes.sum() == n`.
    """
    count = len(lengths)
    if count == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise ValueError(
            f"lengths from {int(lengths.min())} to {int(lengths.max())} into packs of {capacity}"
        )
    # Stable sorts of 16-bit integers are radix sorts, ten times as fast as others.
    shortness = (capacity - lengths.astype(np.int64)).astype(_smallest_type(capacity))
    longest_first = np.argsort(shortness, kind="stable")  # (n,)
    pack_of, packs = _best_fit_decreasing(np.bincount(lengths), capacity)
    packs_of = np.empty(count, _smallest_type(packs))
    packs_of[longest_first] = pack_of
    return np.argsort(packs_of, kind="stable"), np.bincount(packs_of, minlength=packs)


def _best_fit_decreasing(group_sizes: Integers, capacity: int) -> tuple[list[int], int]:
    """Pack `group_sizes[length]` items of each length.

    Returns:
        The pack of each item, the longest item first, and the number of packs.
    """
    distinct = np.flatnonzero(group_sizes)[::-1]
    pack_of: list[int] = []
    packs_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # [room left] -> packs
    rooms = 0  # bit r is set if packs_with[r] is not empty
    packs = 0
    for length, left in zip(distinct.tolist(), group_sizes[distinct].tolist(), strict=True):
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # the least room that is enough
            else:
                room = capacity
                opened = -(-left // (capacity // length))
                packs_with[room] = list(range(packs, packs + opened))
                packs += opened
            stack = packs_with[room]
            each = min(room // length, left)  # best fit returns to a pack it has just put something into
            filled = min(len(stack), left // each)
            chosen = stack[-filled:]
            del stack[-filled:]
            pack_of += chosen * each
            left -= filled * each
            rest = room - each * length
            if rest:
                packs_with[rest] += chosen
                rooms |= 1 << rest
            rooms = rooms | 1 << room if stack else rooms & ~(1 << room)
    return pack_of, packs


def _smallest_type(largest: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if largest < 1 << 16 else np.uint32


def split_packs(sizes: Integers, more: int) -> Integers:
    """Cut packs in two, those with most items first, until there are exactly `more` packs more."""
    while more:
        fullest = np.argsort(-sizes, kind="stable")[:more]
        fullest = np.sort(fullest[sizes[fullest] > 1])
        assert len(fullest), "there are as many packs as items, and no pack can be split"
        halves = sizes[fullest] // 2
        sizes = sizes.copy()
        sizes[fullest] -= halves
        sizes = np.insert(sizes, fullest + 1, halves)
        more -= len(fullest)
    return sizes

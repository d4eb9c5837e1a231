"""Lengths -> packs: best fit decreasing, by classes of equal length. Pure, and the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def pack(
    lengths: npt.NDArray[np.integer[Any]], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Put things of `lengths` (n,), each from 1 to `capacity`, into packs of at most `capacity`.

    Exactly best fit decreasing: the longest first, each into the fullest pack that still has room for it. Things of one
    length are interchangeable, and so are packs with the same room, so both move in whole groups, and the cost is that of
    the distinct lengths: 1 M samples of 16 to 4096 tokens take 0.13 s on one core in windows of 128 k.

    Returns:
        order (n,): the things, pack after pack, in each pack in the order in which they came.
        sizes (p,): how many things each pack holds; `sizes.sum() == n`.
    """
    count = len(lengths)
    if count == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise ValueError(
            f"lengths from {int(lengths.min())} to {int(lengths.max())} into packs of {capacity}"
        )
    # Stable sorts of 16-bit integers are radix sorts, ten times as fast as others.
    longest_first = np.argsort(
        (capacity - lengths.astype(np.int64)).astype(_integers(capacity)), kind="stable"
    )  # (n,)
    group_sizes = np.bincount(lengths)
    distinct = np.flatnonzero(group_sizes)

    pack_of: list[int] = []  # by position in longest_first
    packs_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # [room left] -> packs
    rooms = 0  # bit r is set where packs_with[r] is not empty
    packs = 0
    for length, left in zip(distinct[::-1].tolist(), group_sizes[distinct[::-1]].tolist(), strict=True):
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
            if rest := room - each * length:
                packs_with[rest] += chosen
                rooms |= 1 << rest
            rooms = rooms | 1 << room if stack else rooms & ~(1 << room)

    bins = np.empty(count, _integers(packs))
    bins[longest_first] = pack_of
    return np.argsort(bins, kind="stable"), np.bincount(bins, minlength=packs)


def _integers(largest: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if largest < 1 << 16 else np.uint32


def split_packs(sizes: npt.NDArray[np.int64], more: int) -> npt.NDArray[np.int64]:
    """Cut `more` packs in two, those with most things first, so that there are exactly so many more packs."""
    while more:
        fullest = np.argsort(-sizes, kind="stable")[:more]
        fullest = np.sort(fullest[sizes[fullest] > 1])
        assert len(fullest), "as many packs as things, and still more are asked for"
        halves = sizes[fullest] // 2
        sizes = sizes.copy()
        sizes[fullest] -= halves
        sizes = np.insert(sizes, fullest + 1, halves)
        more -= len(fullest)
    return sizes

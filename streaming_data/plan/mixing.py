"""Exchange documents between packs, so that each pack holds about the mixture.

For batches of few packs: whole packs cannot make up the mixture there, as eight packs of one kind each have a
share of 3/8 or 4/8 and nothing between. The packs stay as many and as full as they were.

Two packs, one with too much of a stream and one with too little, are emptied and filled anew: of many random
ways to divide their documents, the best one is taken in which both fit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from unitoken.streaming_data.arrays import Floats, Integers
from unitoken.streaming_data.plan.order import random_bits

MIXING_ROUNDS = 12  # each pairs the packs by another column
TRIES = 256  # ways to divide two packs: about one in fifteen fits if packs are 98 % full
MOST_DOCUMENTS = 64  # in two packs; packs of more documents are left as they are
PAIRS_AT_ONCE = 256


def mix(lengths: Integers, cells: Integers, packs_of: Integers, capacity: int, *name: Any) -> Integers:
    """Move documents between packs until each pack holds about the mixture.

    Args:
        lengths: (n,) of the documents.
        cells: (n,) the stream and kind of each, numbered from 0.
        packs_of: (n,) the pack that each is in, numbered from 0.
        capacity: the most positions in a pack.
        *name: of the window, for its random numbers.

    Returns:
        packs_of (n,): none is longer than `capacity`, and there are as many packs.
    """
    packs, distinct = int(packs_of.max()) + 1, np.unique(cells)
    if len(distinct) == 1 or packs < 2:
        return packs_of
    packs_of, cells = packs_of.copy(), np.searchsorted(distinct, cells)
    documents = _Documents(lengths, cells, means=np.bincount(cells, lengths) / lengths.sum())
    for number in range(MIXING_ROUNDS):
        cell = number % len(distinct)
        totals = np.bincount(packs_of, lengths, packs)
        surplus = np.bincount(packs_of, lengths * (cells == cell), packs) - documents.means[cell] * totals
        ranked = np.argsort(surplus, kind="stable")
        pairs = np.stack([ranked[: packs // 2], ranked[::-1][: packs // 2]], axis=1)  # least with most
        order = np.argsort(packs_of, kind="stable")
        ends = np.cumsum(np.bincount(packs_of, minlength=packs))
        for begin in range(0, len(pairs), PAIRS_AT_ONCE):
            some = pairs[begin : begin + PAIRS_AT_ONCE]
            _divide(documents, some, order, ends, packs_of, capacity, (number, begin, *name))
    return packs_of


class _Documents(NamedTuple):
    lengths: Integers  # (n,)
    cells: Integers  # (n,)
    means: Floats  # (cells,) share of all positions


def _divide(
    documents: _Documents,
    pairs: Integers,
    order: Integers,
    ends: Integers,
    packs_of: Integers,
    capacity: int,
    name: tuple[Any, ...],
) -> None:
    """Divide the documents of each pair of packs anew if that brings both nearer to the mixture.

    Args:
        documents: of the window.
        pairs: (p, 2) packs.
        order: (n,) the documents pack after pack.
        ends: (packs,) where each pack ends in `order`.
        packs_of: (n,) the pack of each document; changed in place.
        capacity: the most positions in a pack.
        name: of the random numbers.
    """
    begins = np.concatenate([[0], ends[:-1]])
    counts = (ends - begins)[pairs]  # (p, 2)
    small = counts.sum(axis=1) <= MOST_DOCUMENTS
    pairs, counts = pairs[small], counts[small]
    if not len(pairs):
        return
    width = int(counts.sum(axis=1).max())
    column = np.arange(width)  # of a pair's documents: the first pack's, then the second's
    in_first, present = column < counts[:, :1], column < counts.sum(axis=1)[:, None]  # (p, width)
    places = np.where(in_first, begins[pairs[:, :1]] + column, begins[pairs[:, 1:]] + column - counts[:, :1])
    chosen = order[np.where(present, places, 0)]  # (p, width) documents
    sizes = np.where(present, documents.lengths[chosen], 0)
    bits = random_bits(len(pairs) * TRIES * width // 32 + 1, "ways", *name)
    ways = np.unpackbits(bits.view(np.uint8), count=len(pairs) * TRIES * width)
    ways = ways.reshape(len(pairs), TRIES, width)  # 1: the document goes to the first pack
    ways[:, 0] = in_first  # as it is
    first = np.einsum("ptw,pw->pt", ways, sizes, dtype=np.int64)  # positions in the first pack
    whole = sizes.sum(axis=1)[:, None]
    fits = (first <= capacity) & (whole - first <= capacity) & (first > 0) & (first < whole)
    distance = np.zeros(first.shape)  # from the mixture, squared
    for cell, mean in enumerate(documents.means.tolist()):
        of_cell = np.where(documents.cells[chosen] == cell, sizes, 0)
        in_first_pack = np.einsum("ptw,pw->pt", ways, of_cell, dtype=np.int64)
        in_second_pack = of_cell.sum(axis=1)[:, None] - in_first_pack
        distance += (in_first_pack - mean * first) ** 2 + (in_second_pack - mean * (whole - first)) ** 2
    best = np.argmin(np.where(fits, distance, np.inf), axis=1)  # the first of equals: as it is
    to_first = ways[np.arange(len(pairs)), best].astype(bool)
    packs_of[chosen[present]] = np.where(to_first, pairs[:, :1], pairs[:, 1:])[present]

"""Packs of unlike content -> packs of like content, as many and as full: for batches of so few packs that whole ones can not
make up the mixture. Eight packs of one kind each have a share of 3/8 or 4/8 and nothing between.

Two packs, one with too much of a stream and one with too little, are emptied and filled anew: of many random ways to divide
their documents, the one in which both fit and hold most nearly the mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.streaming_data.plan.order import random_bits

ROUNDS = 12  # each with pairs by another column
TRIES = 256  # ways to divide two packs: about one in fifteen fits where packs are 98 % full
MOST_DOCUMENTS = 64  # of two packs: those of more are mixed as they are
PAIRS_AT_ONCE = 256

Ids = npt.NDArray[np.int64]


def mix(lengths: Ids, cells: Ids, packs_of: Ids, capacity: int, *name: Any) -> Ids:
    """Args:
        lengths: (n,) of the documents.
        cells: (n,) the stream and kind of each, numbered from 0.
        packs_of: (n,) the pack that each is in, numbered from 0.
        name: of the window, for its random numbers.

    Returns:
        packs_of (n,): none is longer than `capacity`, and there are as many.
    """
    packs, kinds = int(packs_of.max()) + 1, np.unique(cells)
    if len(kinds) == 1 or packs < 2:
        return packs_of
    packs_of, cells = packs_of.copy(), np.searchsorted(kinds, cells)
    means = np.bincount(cells, lengths) / lengths.sum()
    for number in range(ROUNDS):
        kind = number % len(kinds)
        total = np.bincount(packs_of, lengths, packs)
        surplus = np.bincount(packs_of, lengths * (cells == kind), packs) - means[kind] * total
        ranked = np.argsort(surplus, kind="stable")
        pairs = np.stack([ranked[: packs // 2], ranked[::-1][: packs // 2]], axis=1)  # least with most
        order = np.argsort(packs_of, kind="stable")
        ends = np.cumsum(np.bincount(packs_of, minlength=packs))
        for begin in range(0, len(pairs), PAIRS_AT_ONCE):
            some = pairs[begin : begin + PAIRS_AT_ONCE]
            _divide(some, order, ends, lengths, cells, means, packs_of, capacity, (number, begin, *name))
    return packs_of


def _divide(
    pairs: Ids,
    order: Ids,
    ends: Ids,
    lengths: Ids,
    cells: Ids,
    means: npt.NDArray[np.float64],
    packs_of: Ids,
    capacity: int,
    name: tuple[Any, ...],
) -> None:
    """Move the documents of `pairs` (p, 2) where that is better; `packs_of` is changed."""
    begins = np.concatenate([[0], ends[:-1]])
    counts = (ends - begins)[pairs]  # (p, 2)
    pairs, counts = pairs[keep := counts.sum(axis=1) <= MOST_DOCUMENTS], counts[keep]
    if not len(pairs):
        return
    width = int(counts.sum(axis=1).max())
    column = np.arange(width)  # of a pair's documents: the first pack's, then the second's
    first, there = column < counts[:, :1], column < counts.sum(axis=1)[:, None]
    places = np.where(first, begins[pairs[:, :1]] + column, begins[pairs[:, 1:]] + column - counts[:, :1])
    documents = order[np.where(there, places, 0)]  # (p, width)
    sizes = np.where(there, lengths[documents], 0)
    bits = random_bits(len(pairs) * TRIES * width // 32 + 1, "ways", *name)
    ways = np.unpackbits(bits.view(np.uint8), count=len(pairs) * TRIES * width).reshape(
        len(pairs), TRIES, width
    )
    ways[:, 0] = first  # as it is
    taken = np.einsum("ptw,pw->pt", ways, sizes, dtype=np.int64)
    whole = sizes.sum(axis=1)[:, None]
    fits = (taken <= capacity) & (whole - taken <= capacity) & (taken > 0) & (taken < whole)
    off = np.zeros(taken.shape)
    for kind, mean in enumerate(means.tolist()):
        of_kind = np.where(cells[documents] == kind, sizes, 0)
        mine = np.einsum("ptw,pw->pt", ways, of_kind, dtype=np.int64)
        rest = of_kind.sum(axis=1)[:, None] - mine
        off += (mine - mean * taken) ** 2 + (rest - mean * (whole - taken)) ** 2
    best = np.argmin(np.where(fits, off, np.inf), axis=1)  # the first of equals: as it is
    chosen = ways[np.arange(len(pairs)), best].astype(bool)
    packs_of[documents[there]] = np.where(chosen, pairs[:, :1], pairs[:, 1:])[there]

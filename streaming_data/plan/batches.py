"""Packs -> global batches that each hold the epoch's mixture.

Best fit puts documents of like length into one pack, and length goes with kind: in random order the share of a stream
scatters from batch to batch up to twice as much as if packs were filled at random. So the packs of a window are dealt:
ordered by what they hold, cut into as many strata as a batch has packs, one pack of each stratum to each batch; then pairs
of batches exchange packs as long as that brings both nearer to the mean. mosaicml-streaming has `batching_method:
stratified` for single samples.

Pure, and the same on every machine: sums are of whole numbers, and all else is done number by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.streaming_data.plan.order import random_bits, random_order

ROUNDS = 16  # of exchanges; see docs/BENCHMARKS.md for what they bring and cost

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Amounts = npt.NDArray[np.int64]  # (columns, packs): tokens of a stream and kind, images


class Surplus:
    """What each global batch has so far beyond its share, from other rows and windows: those that follow even it out."""

    def __init__(self, columns: int) -> None:
        self._amounts = np.zeros((columns, 0))

    def of(self, begin: int, end: int) -> Floats:
        """(columns, end - begin), to be read and changed."""
        columns, known = self._amounts.shape
        if end > known:
            self._amounts = np.hstack([self._amounts, np.zeros((columns, end + end // 2 - known))])
        return self._amounts[:, begin:end]


def deal(amounts: Amounts, first: int, batch: int, surplus: Surplus, *name: Any) -> Ids:
    """The packs of a window in the order in which they are trained on.

    Args:
        amounts: (columns, packs) what each pack holds, in random order.
        first: place in its row of the window's first pack: the batch that it falls into may have begun in the window before.
        batch: packs that a batch takes from the row.
        surplus: is brought up to date.
        name: of the window, for its random numbers.

    Returns:
        order (packs,): which pack stands at each place.
    """
    count = amounts.shape[1]
    if not amounts.any():
        return np.arange(count)
    batches = (first + np.arange(count)) // batch - first // batch  # (packs,) by place
    sizes = np.bincount(batches)
    off = surplus.of(first // batch, first // batch + len(sizes))
    used = np.flatnonzero(amounts.any(axis=1))
    amounts = amounts[used]
    scales = np.sqrt(
        [float((column * column).sum()) / count for column in amounts]
    )  # a pack has 1 in the mean square
    columns = [column / scale for column, scale in zip(amounts, scales, strict=True)]
    order = _in_strata(columns, batches, sizes, name)
    grid = np.full((len(sizes), batch), -1)
    grid[batches, np.arange(count) - (np.cumsum(sizes) - sizes)[batches]] = order
    before = off[used] - sizes * (amounts.sum(axis=1) / count)[:, None]
    _exchange(columns, list((before + _held(amounts, grid)) / scales[:, None]), grid, name)
    off[used] = before + _held(amounts, grid)
    keys = random_bits(grid.size, "in batch", *name).reshape(
        grid.shape
    )  # so that strata do not stand in a row
    mixed = np.take_along_axis(grid, np.argsort(keys, axis=1, kind="stable"), axis=1).reshape(-1)
    placed: Ids = mixed[mixed >= 0]
    return placed


def scheduled(counts: Sequence[int], *name: Any) -> Ids:
    """Which part has each turn, where part n has `counts[n]` of them: evenly spread, at random within that."""
    parts = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(parts)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (number + random_bits(len(parts), *name) * 2.0**-32) / np.asarray(counts)[parts]
    turns: Ids = parts[np.argsort(places, kind="stable")]
    return turns


def _in_strata(columns: list[Floats], batches: Ids, sizes: Ids, name: tuple[Any, ...]) -> Ids:
    """Each batch gets a pack of every stratum. One of c places takes from c of them: a batch that is cut by the window's
    end holds the mixture, too.
    """
    largest, of_largest = columns[0].copy(), np.zeros(len(columns[0]), np.int64)
    for this, column in enumerate(columns[1:], 1):
        more = column > largest
        largest[more], of_largest[more] = column[more], this
    path = np.argsort(np.where(of_largest % 2 == 0, largest, -largest), kind="stable")  # back and forth
    path = path[np.argsort(of_largest[path], kind="stable")]
    number = np.arange(len(batches)) - (np.cumsum(sizes) - sizes)[batches]  # in its batch
    places = (number + random_bits(len(batches), "strata", *name) * 2.0**-32) / sizes[
        batches
    ]  # along the path, from 0 to 1
    order = np.empty(len(batches), np.int64)
    order[np.argsort(places, kind="stable")] = path
    return order


def _held(amounts: Amounts, grid: Ids) -> Amounts:
    """(columns, batches)"""
    return np.stack([np.where(grid >= 0, column[grid], 0).sum(axis=1) for column in amounts])


def _exchange(columns: list[Floats], off: list[Floats], grid: Ids, name: tuple[Any, ...]) -> None:
    """Two batches exchange the pair of packs, of those that stand opposite, that brings both nearest to the mean.

    Args:
        columns: of each amount (packs,).
        off: of each amount (batches,): how far each batch is from the mean.
        grid: (batches, packs) which packs each batch has, -1 where it has fewer; changed.
    """
    held = grid >= 0
    count, batch = grid.shape
    amounts = [np.where(held, column[grid], 0.0) for column in columns]  # (batches, packs) each
    shifts = random_bits(ROUNDS, "shifts", *name) % batch
    for number in range(ROUNDS):
        pairs = random_order(count, "pairs", number, *name)
        left, right = pairs[: count // 2], pairs[count // 2 : count // 2 * 2]
        places = (np.arange(batch) + shifts[number]) % batch
        gain = np.where(held[left] & held[right][:, places], 0.0, np.inf)
        steps = []
        for amount, distance in zip(amounts, off, strict=True):
            step = amount[right][:, places] - amount[left]  # (pairs, packs)
            gain += step * (step + (distance[left] - distance[right])[:, None])
            steps.append(step)
        best = np.argmin(gain, axis=1)
        rows = np.flatnonzero(gain[np.arange(len(left)), best] < 0)
        a, b, at, to = left[rows], right[rows], best[rows], places[best[rows]]
        grid[a, at], grid[b, to] = grid[b, to], grid[a, at]
        for amount, distance, step in zip(amounts, off, steps, strict=True):
            moved = step[rows, at]
            amount[a, at], amount[b, to] = amount[b, to], amount[a, at]
            distance[a] += moved
            distance[b] -= moved

"""Packs -> global batches that each hold the epoch's mixture.

Best fit puts documents of like length into one pack, and length goes with kind: in random order the share of
a stream scatters from batch to batch up to twice as much as if packs were filled at random. So the packs of a
window are dealt: ordered by what they hold, cut into as many strata as a batch has packs, one pack of each
stratum to each batch. Then pairs of batches exchange packs as long as that moves both nearer to the mean.
mosaicml-streaming has `batching_method: stratified` for single samples.

Pure, and the same on every machine: sums are of whole numbers, and all else is computed number by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from unitoken.streaming_data.arrays import Floats, Integers
from unitoken.streaming_data.plan.order import random_bits, random_order

EXCHANGE_ROUNDS = 16  # see docs/BENCHMARKS.md for their effect and cost


class Surplus:
    """What each global batch has so far beyond its share. Later rows and windows even it out."""

    def __init__(self, columns: int) -> None:
        self._amounts = np.zeros((columns, 0))

    def of(self, begin: int, end: int) -> Floats:
        """Return the surplus of batches [begin, end), (columns, end - begin), a view that may be changed."""
        columns, known = self._amounts.shape
        if end > known:
            self._amounts = np.hstack([self._amounts, np.zeros((columns, end + end // 2 - known))])
        return self._amounts[:, begin:end]


def deal(amounts: Integers, first: int, batch: int, surplus: Surplus, *name: Any) -> Integers:
    """Return the packs of a window in the order in which they are trained on.

    Args:
        amounts: (columns, packs) what each pack holds: tokens of each stream and kind, and images; in random
            order.
        first: place in its row of the window's first pack; its batch may have begun in the window before.
        batch: packs that a global batch takes from the row.
        surplus: of the batches so far; updated.
        *name: of the window, for its random numbers.

    Returns:
        order (packs,): which pack is at each place.
    """
    count = amounts.shape[1]
    if not amounts.any():
        return np.arange(count)
    batches = (first + np.arange(count)) // batch - first // batch  # (packs,) by place
    sizes = np.bincount(batches)
    window_surplus = surplus.of(first // batch, first // batch + len(sizes))
    used = np.flatnonzero(amounts.any(axis=1))
    amounts = amounts[used]
    # In these units the mean square of a column is 1.
    scales = np.sqrt([float((column * column).sum()) / count for column in amounts])
    columns = [column / scale for column, scale in zip(amounts, scales, strict=True)]
    order = _order_in_strata(columns, batches, sizes, name)
    grid = np.full((len(sizes), batch), -1)  # the packs of each batch
    grid[batches, np.arange(count) - (np.cumsum(sizes) - sizes)[batches]] = order
    before = window_surplus[used] - sizes * (amounts.sum(axis=1) / count)[:, None]
    _exchange(columns, list((before + _batch_amounts(amounts, grid)) / scales[:, None]), grid, name)
    window_surplus[used] = before + _batch_amounts(amounts, grid)
    # Shuffle each batch, so that its packs are not in the order of the strata.
    keys = random_bits(grid.size, "in batch", *name).reshape(grid.shape)
    shuffled = np.take_along_axis(grid, np.argsort(keys, axis=1, kind="stable"), axis=1).reshape(-1)
    placed: Integers = shuffled[shuffled >= 0]
    return placed


def schedule_turns(counts: Sequence[int], *name: Any) -> Integers:
    """Return which part has each turn if part n has `counts[n]` turns: evenly spread, then random."""
    parts = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(parts)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (number + random_bits(len(parts), *name) * 2.0**-32) / np.asarray(counts)[parts]
    turns: Integers = parts[np.argsort(places, kind="stable")]
    return turns


def _order_in_strata(
    columns: list[Floats], batches: Integers, sizes: Integers, name: tuple[Any, ...]
) -> Integers:
    """Order the packs so that each batch gets a pack of every stratum.

    A batch with room for c packs takes one from each of c strata, so one that the window's end cuts holds the
    mixture, too.

    Args:
        columns: of each amount (packs,).
        batches: (packs,) the batch of each place.
        sizes: (batches,) packs of each batch.
        name: of the window, for its random numbers.
    """
    largest, of_largest = columns[0].copy(), np.zeros(len(columns[0]), np.int64)
    for number, column in enumerate(columns[1:], 1):
        more = column > largest
        largest[more], of_largest[more] = column[more], number
    # A path through the packs: by their largest column, and back and forth inside it.
    path = np.argsort(np.where(of_largest % 2 == 0, largest, -largest), kind="stable")
    path = path[np.argsort(of_largest[path], kind="stable")]
    place_in_batch = np.arange(len(batches)) - (np.cumsum(sizes) - sizes)[batches]
    jitter = random_bits(len(batches), "strata", *name) * 2.0**-32
    along_path = (place_in_batch + jitter) / sizes[batches]  # from 0 to 1
    order = np.empty(len(batches), np.int64)
    order[np.argsort(along_path, kind="stable")] = path
    return order


def _batch_amounts(amounts: Integers, grid: Integers) -> Integers:
    """Return what each batch holds, (columns, batches)."""
    return np.stack([np.where(grid >= 0, column[grid], 0).sum(axis=1) for column in amounts])


def _exchange(columns: list[Floats], distances: list[Floats], grid: Integers, name: tuple[Any, ...]) -> None:
    """Let pairs of batches exchange the two packs that move both nearest to the mean, in several rounds.

    In a round, each pack can only be exchanged for the one at the opposite place of the other batch.

    Args:
        columns: of each amount (packs,).
        distances: of each amount (batches,), how far each batch is from the mean; changed in place.
        grid: (batches, packs) which packs each batch has, -1 where it has fewer; changed in place.
        name: of the window, for its random numbers.
    """
    held = grid >= 0
    count, batch = grid.shape
    amounts = [np.where(held, column[grid], 0.0) for column in columns]  # (batches, packs) each
    shifts = random_bits(EXCHANGE_ROUNDS, "shifts", *name) % batch
    for number in range(EXCHANGE_ROUNDS):
        pairs = random_order(count, "pairs", number, *name)
        left, right = pairs[: count // 2], pairs[count // 2 : count // 2 * 2]
        opposite = (np.arange(batch) + shifts[number]) % batch
        change = np.where(held[left] & held[right][:, opposite], 0.0, np.inf)  # of the squared distances
        steps = []
        for amount, distance in zip(amounts, distances, strict=True):
            step = amount[right][:, opposite] - amount[left]  # (pairs, packs)
            change += step * (step + (distance[left] - distance[right])[:, None])
            steps.append(step)
        best = np.argmin(change, axis=1)
        rows = np.flatnonzero(change[np.arange(len(left)), best] < 0)
        a, b, at, to = left[rows], right[rows], best[rows], opposite[best[rows]]
        grid[a, at], grid[b, to] = grid[b, to], grid[a, at]
        for amount, distance, step in zip(amounts, distances, steps, strict=True):
            moved = step[rows, at]
            amount[a, at], amount[b, to] = amount[b, to], amount[a, at]
            distance[a] += moved
            distance[b] -= moved

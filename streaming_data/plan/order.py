"""The order of an epoch before packing: which samples are chosen, and in which window each of them is packed.

    weights -> how much of each stream -> its samples, shard by shard -> canonical rows -> windows

Every stream advances evenly through the epoch, so that each stretch of it holds the mixture. A stream's
shards come in random order, and each sample moves up to half a block away from its place: well mixed, with
few shards in use at a time (the idea of `py1e` in mosaicml-streaming).

Where a sample goes follows from its number and a counter-based generator, so any stretch of an epoch can be
computed alone: 100 M samples need no array of 100 M numbers but the plan itself. Only the raw output of
Philox is used, which is the same in every version of numpy; that of its `permutation` and `choice` is not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.streaming_data.arrays import Integers, SampleIds
from unitoken.streaming_data.plan.lengths import StreamSamples

SHUFFLE_BLOCK = 1 << 18  # samples of the mixture over which a sample may move; upstream's default
STRETCH = 1 << 21  # samples that are ordered at once: eight blocks, as the two ends cost one more


def random_bits(count: int, *name: Any, start: int = 0) -> SampleIds:
    """Return `count` random numbers of 32 bits, from number `start` on of the sequence called `name`."""
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    generator = np.random.Philox(key=key).advance(start // 8)  # one step makes 8 numbers of 32 bits
    words = generator.random_raw((start % 8 + count + 1) // 2).astype("<u8", copy=False)
    bits: SampleIds = words.view("<u4")[start % 8 : start % 8 + count]
    return bits


def random_order(count: int, *name: Any) -> Integers:
    """Return a random permutation of `count` numbers, the one called `name`."""
    return np.argsort(random_bits(count, *name), kind="stable")


def epoch_amounts(streams: Sequence[StreamSamples], unit: str, size: tuple[str, int] | None) -> list[float]:
    """Return how much an epoch takes of each stream, in `unit`.

    Args:
        streams: the samples of each stream, with its weight.
        unit: "samples", "tokens" or "target_tokens".
        size: of the epoch, as ("samples" or "tokens", how many). None: with proportions, what all streams
            have together in `unit`; otherwise each stream's own repeat or choose.
    """
    totals = [stream.total(unit) for stream in streams]
    if size is None and not any("proportion" in stream.weight for stream in streams):
        own = [
            stream.weight.get("choose", stream.weight.get("repeat", 1.0) * total)
            for stream, total in zip(streams, totals, strict=True)
        ]
        return [float(round(amount)) if unit == "samples" else float(amount) for amount in own]
    shares = [stream.weight.get("proportion", total) for stream, total in zip(streams, totals, strict=True)]
    size_unit, epoch_size = size or (unit, sum(totals))
    per_share = sum(  # what one share of the mixture is in the unit of the epoch's size
        share * stream.total(size_unit) / total
        for share, stream, total in zip(shares, streams, totals, strict=True)
    )
    ends = np.concatenate([[0.0], np.cumsum([epoch_size * share / per_share for share in shares])])
    if unit == "samples":
        ends = np.floor(ends + 0.5)  # whole samples, exactly as many in all
    result: list[float] = np.diff(ends).tolist()
    return result


@dataclass(frozen=True, eq=False)
class Chosen:
    """The samples that an epoch takes of a stream, at positions 0, 1, 2 and so on.

    They come shard by shard, all once before any comes twice.
    A unit is what is taken of one shard at one time.
    """

    name: str
    candidates: SampleIds | range
    subset: SampleIds  # candidates that are taken once more than the others
    unit_begins: Integers  # (units + 1,) first position of each unit
    unit_shifts: Integers  # (units,) from a position to its place in the candidates followed by the subset

    @property
    def count(self) -> int:
        """Number of samples, repetitions included."""
        return int(self.unit_begins[-1])

    @property
    def largest_unit(self) -> int:
        """The most samples that are taken of a shard at one time."""
        return int(np.diff(self.unit_begins).max(initial=0))

    def ids(self, begin: int, end: int) -> Integers:
        """Return the samples at positions [begin, end), numbered inside the stream."""
        first = int(np.searchsorted(self.unit_begins, begin, side="right")) - 1
        last = int(np.searchsorted(self.unit_begins, end, side="left"))
        sizes = np.diff(self.unit_begins[first : last + 1].clip(begin, end))
        places = np.arange(begin, end) + np.repeat(self.unit_shifts[first:last], sizes)
        again = np.flatnonzero(places >= len(self.candidates))
        extra = self.subset[places[again] - len(self.candidates)]
        if not isinstance(self.candidates, range):
            places = self.candidates[np.minimum(places, len(self.candidates) - 1)].astype(np.int64)
        places[again] = extra
        return places


def choose_samples(
    stream: StreamSamples, amount: float, unit: str, seed: int, epoch: int, shuffle: bool
) -> Chosen:
    """Take `amount` of a stream: every candidate equally often, and a random subset of them once more."""
    all_are_candidates = int(np.count_nonzero(stream.lengths)) == len(stream.lengths)
    candidates = (
        range(len(stream.lengths)) if all_are_candidates else np.flatnonzero(stream.lengths).astype(np.uint32)
    )
    passes, rest = divmod(amount, stream.total(unit))
    subset = _random_subset(stream, rest, unit, seed, epoch if shuffle else 0)
    shards = np.concatenate([[0], np.cumsum(stream.shard_sizes)])
    in_shards = np.diff(shards if isinstance(candidates, range) else np.searchsorted(candidates, shards))
    subset_in_shards = np.diff(np.searchsorted(subset, shards))

    sizes, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number in range(int(passes) + 1):
        taken = in_shards if number < passes else subset_in_shards
        starts = np.cumsum(taken) - taken + (0 if number < passes else len(candidates))
        order = np.flatnonzero(taken)
        if shuffle:
            order = order[random_order(len(order), "shards", seed, epoch, stream.name, number)]
        sizes.append(taken[order])
        places.append(starts[order])
    begins = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Chosen(stream.name, candidates, subset, begins, np.concatenate(places) - begins[:-1])


class _Stretch(NamedTuple):
    """A stretch of a stream's samples, with their random numbers."""

    begin: int
    bits: SampleIds  # (n,)
    weights: Any  # (n,) in the mixture's unit; 0: no candidate


def _stretches(stream: StreamSamples, unit: str, seed: int, epoch: int) -> Iterator[_Stretch]:
    for begin in range(0, len(stream.lengths), STRETCH):
        rows = slice(begin, begin + STRETCH)
        weights = stream.target_tokens[rows] if unit == "target_tokens" else stream.lengths[rows]
        bits = random_bits(len(weights), "subset", seed, epoch, stream.name, start=begin)
        yield _Stretch(begin, bits, (weights > 0).astype(np.uint32) if unit == "samples" else weights)


def _random_subset(stream: StreamSamples, amount: float, unit: str, seed: int, epoch: int) -> SampleIds:
    """Return candidates drawn without repetition whose sum is as near to `amount` as possible; ascending.

    These are the candidates with the smallest random numbers. A histogram of the numbers' upper halves shows
    in which of 65,536 parts the last of them is, so that only this part has to be sorted.
    """
    if amount < 0.5:
        return np.zeros(0, np.uint32)
    histogram = np.zeros(1 << 16)  # amounts by the upper halves of the random numbers
    for _, bits, weights in _stretches(stream, unit, seed, epoch):
        histogram += np.bincount(bits >> 16, weights, 1 << 16)
    last = min(int(np.searchsorted(np.cumsum(histogram), amount)), (1 << 16) - 1)
    below: list[Integers] = []
    last_ids: list[Integers] = []
    last_bits: list[SampleIds] = []
    last_weights: list[Any] = []
    for begin, bits, weights in _stretches(stream, unit, seed, epoch):
        candidates = stream.lengths[begin : begin + len(bits)] > 0
        below.append(np.flatnonzero(candidates & (bits >> 16 < last)) + begin)
        rows = np.flatnonzero(candidates & (bits >> 16 == last))
        last_ids.append(rows + begin)
        last_bits.append(bits[rows])
        last_weights.append(weights[rows])
    order = np.argsort(np.concatenate(last_bits), kind="stable")
    sums = np.cumsum(np.concatenate(last_weights)[order], dtype=np.float64)
    sums = np.concatenate([[0.0], sums]) + histogram[:last].sum()
    nearest = int(np.argmin(np.abs(sums - amount)))
    return np.sort(np.concatenate([*below, np.concatenate(last_ids)[order[:nearest]]])).astype(np.uint32)


@dataclass(frozen=True)
class CanonicalRow:
    """A part of the epoch: a stretch of each stream's positions, and how many windows they are packed in."""

    number: int
    stretches: tuple[tuple[int, int], ...]
    windows: int

    @property
    def samples(self) -> int:
        """Number of samples of all streams."""
        return sum(end - begin for begin, end in self.stretches)


def rows_of(chosen: Sequence[Chosen], rows: int, window: int) -> list[CanonicalRow]:
    """Cut the epoch into canonical rows, which share no shard except those at their borders.

    Raises:
        ConfigError: there are too few samples, and a row would be empty.
    """
    result = []
    for number in range(rows):
        stretches = tuple((c.count * number // rows, c.count * (number + 1) // rows) for c in chosen)
        samples = sum(end - begin for begin, end in stretches)
        if not samples:
            total = sum(c.count for c in chosen)
            raise ConfigError(
                f"too few samples for canonical_nodes: {rows}: "
                f"an epoch has {total} samples, and each row needs at least one"
            )
        windows = max(1, round(samples / window))  # windows of equal size
        result.append(CanonicalRow(number, stretches, windows))
    return result


def windows_of(
    streams: Sequence[StreamSamples],
    chosen: Sequence[Chosen],
    row: CanonicalRow,
    seed: int,
    epoch: int,
    shuffle: bool,
    *,
    shuffle_block: int = SHUFFLE_BLOCK,
    stretch: int = STRETCH,
) -> Iterator[tuple[SampleIds, SampleIds]]:
    """Yield the windows of a row: their samples in random order, numbered through all streams, and lengths.

    Args:
        streams: the samples of each stream.
        chosen: what the epoch takes of each stream.
        row: the canonical row.
        seed: the mixture's.
        epoch: from 0.
        shuffle: False keeps the samples in their order.
        shuffle_block: samples of the mixture over which a sample may move.
        stretch: samples that are ordered at once, which does not change the result.
    """
    total = sum(c.count for c in chosen)
    firsts = np.cumsum([0] + [len(stream.lengths) for stream in streams])[:-1]
    at_once = max(1, stretch * row.windows // row.samples)
    for first in range(0, row.windows, at_once):
        last = min(first + at_once, row.windows)
        ids, lengths, windows, ranks = [], [], [], []
        for stream, taken, positions, offset in zip(streams, chosen, row.stretches, firsts, strict=True):
            block = max(shuffle_block * taken.count / total, 2 * taken.largest_unit) if shuffle else 0
            placed = _place(taken, positions, (first, last), row.windows, block, seed, epoch)
            ids.append((placed.ids + offset).astype(np.uint32))
            lengths.append(stream.lengths[placed.ids])
            windows.append(placed.windows)
            ranks.append(placed.ranks)
        all_windows = np.concatenate(windows)
        order = np.argsort(np.concatenate(ranks), kind="stable")
        order = order[np.argsort(all_windows[order], kind="stable")]  # 16-bit keys: radix sorts
        all_ids, all_lengths = np.concatenate(ids)[order], np.concatenate(lengths)[order]
        ends = np.cumsum(np.bincount(all_windows, minlength=last - first))
        for begin, end in zip(ends - np.diff(ends, prepend=0), ends, strict=True):
            yield all_ids[begin:end], all_lengths[begin:end]


class _Placed(NamedTuple):
    """Samples of a stream with their places in a row, (n,) each."""

    ids: Integers
    windows: npt.NDArray[np.uint16]  # counted from the first of those that are ordered at once
    ranks: Any  # sort keys inside the window


def _place(
    taken: Chosen,
    positions: tuple[int, int],
    windows: tuple[int, int],
    windows_in_row: int,
    block: float,
    seed: int,
    epoch: int,
) -> _Placed:
    """Return the samples of a stream that belong to windows [first, last) of a row.

    Args:
        taken: what the epoch takes of the stream.
        positions: the stretch of these that is the row's, [begin, end).
        windows: first and last.
        windows_in_row: how many the row has in all.
        block: positions over which a sample may move; 0 keeps the order.
        seed: the mixture's.
        epoch: from 0.
    """
    begin, count = positions[0], positions[1] - positions[0]
    if not count:
        return _Placed(np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint16))
    block = min(block, count)
    low = max(0, math.floor(windows[0] / windows_in_row * count - block / 2) - 1)
    high = min(count, math.ceil(windows[1] / windows_in_row * count + block / 2) + 1)
    places = np.arange(low, high) + 0.5  # in the stretch, from 0 to count
    ranks: Any = places / count
    if block:
        bits = random_bits(high - low, "places", seed, epoch, taken.name, start=begin + low)
        places += (bits * 2.0**-32 - 0.5) * block
        # What would leave the row at one of its ends is reflected, so that the row stays evenly filled.
        places = np.abs(places)
        places = np.where(places > count, 2 * count - places, places)
        ranks = bits.astype(np.uint16)  # the lower half, which is independent of the place
    window = np.minimum((places * (windows_in_row / count)).astype(np.int64), windows_in_row - 1)
    inside = np.flatnonzero((window >= windows[0]) & (window < windows[1]))
    return _Placed(
        taken.ids(begin + low, begin + high)[inside],
        (window[inside] - windows[0]).astype(np.uint16),
        ranks[inside],
    )

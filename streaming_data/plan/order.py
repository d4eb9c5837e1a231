"""The order of an epoch before packing: which samples are chosen, and in which window each of them is packed.

    weights -> how much of each stream -> its samples, shard by shard -> canonical rows -> windows

Every stream advances evenly through the epoch, so that each stretch of it holds the mixture that was asked for. A stream's
shards come in random order, and each of its samples moves up to half a block away from its place: well mixed, with few
shards in use at a time (the idea of `py1e` in mosaicml-streaming).

Where a sample goes follows from its number and a counter-based generator, so any stretch of an epoch can be made alone:
100 M samples need no array of 100 M numbers but the plan itself. Only raw output of Philox is used, which is the same in
every version of numpy; that of its `permutation` and `choice` is not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.streaming_data.plan.lengths import StreamSamples

SHUFFLE_BLOCK = 1 << 18  # samples of the mixture over which a sample may move; upstream's default
STRETCH = 1 << 21  # samples that are made at once: eight blocks, as the ends cost one more

Ids = npt.NDArray[np.int64]
SampleIds = npt.NDArray[np.uint32]


def random_bits(count: int, *name: Any, start: int = 0) -> SampleIds:
    """(count,) random numbers: from number `start` on of the sequence that is called `name`."""
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little")).advance(
        start // 8
    )  # a step makes 8 of 32 bits
    words = generator.random_raw((start % 8 + count + 1) // 2).astype("<u8", copy=False)
    bits: SampleIds = words.view("<u4")[start % 8 : start % 8 + count]
    return bits


def random_order(count: int, *name: Any) -> Ids:
    return np.argsort(random_bits(count, *name), kind="stable")


def amounts(streams: Sequence[StreamSamples], unit: str, size: tuple[str, int] | None) -> list[float]:
    """How much of each stream an epoch takes, in `unit`.

    Args:
        size: the epoch's, as ("samples" or "tokens", how many). None: with proportions what all streams have together, in
            `unit`; without, each stream's own repeat or choose.
    """
    totals = [stream.total(unit) for stream in streams]
    if size is None and not any("proportion" in stream.weight for stream in streams):
        found = [
            s.weight.get("choose", s.weight.get("repeat", 1.0) * total)
            for s, total in zip(streams, totals, strict=True)
        ]
        return [float(round(amount)) if unit == "samples" else float(amount) for amount in found]
    shares = [stream.weight.get("proportion", total) for stream, total in zip(streams, totals, strict=True)]
    counted, wanted = size or (unit, sum(totals))
    a_share = sum(
        s * stream.total(counted) / total for s, stream, total in zip(shares, streams, totals, strict=True)
    )
    ends = np.concatenate([[0.0], np.cumsum([wanted * share / a_share for share in shares])])
    if unit == "samples":
        ends = np.floor(ends + 0.5)  # whole samples, exactly as many in all
    amounts: list[float] = np.diff(ends).tolist()
    return amounts


@dataclass(frozen=True, eq=False)
class Chosen:
    """The samples that an epoch takes of one stream, at positions 0, 1, ...: shard by shard, all once before any twice."""

    name: str
    candidates: SampleIds | range
    subset: SampleIds  # of the candidates: taken once more than the others
    unit_begins: (
        Ids  # (units + 1,) first position of each unit; a unit is what is taken of one shard at one time
    )
    unit_shifts: Ids  # (units,) from a position to its place in the candidates followed by the subset

    @property
    def count(self) -> int:
        return int(self.unit_begins[-1])

    @property
    def largest_unit(self) -> int:
        return int(np.diff(self.unit_begins).max(initial=0))

    def ids(self, begin: int, end: int) -> Ids:
        """The samples at positions [begin, end), numbered inside the stream."""
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


def choose(stream: StreamSamples, amount: float, unit: str, seed: int, epoch: int, shuffle: bool) -> Chosen:
    """Take `amount` of a stream: every candidate as often as it goes, and a random part of them once more."""
    all_of_them = int(np.count_nonzero(stream.lengths)) == len(stream.lengths)
    candidates = (
        range(len(stream.lengths)) if all_of_them else np.flatnonzero(stream.lengths).astype(np.uint32)
    )
    passes, rest = divmod(amount, stream.total(unit))
    subset = _subset(stream, rest, unit, seed, epoch if shuffle else 0)
    shards = np.concatenate([[0], np.cumsum(stream.shard_sizes)])
    in_shards = np.diff(shards if isinstance(candidates, range) else np.searchsorted(candidates, shards))
    again_in_shards = np.diff(np.searchsorted(subset, shards))

    sizes, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number in range(int(passes) + 1):
        taken = in_shards if number < passes else again_in_shards
        starts = np.cumsum(taken) - taken + (0 if number < passes else len(candidates))
        order = np.flatnonzero(taken)
        if shuffle:
            order = order[random_order(len(order), "shards", seed, epoch, stream.name, number)]
        sizes.append(taken[order])
        places.append(starts[order])
    begins = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Chosen(stream.name, candidates, subset, begins, np.concatenate(places) - begins[:-1])


def _subset(stream: StreamSamples, amount: float, unit: str, seed: int, epoch: int) -> SampleIds:
    """Candidates drawn without repetition until they make up `amount`, as nearly as whole samples can; ascending.

    Those with the smallest random numbers: first the numbers' upper halves are counted, then one of 65,536 parts is sorted.
    """
    if amount < 0.5:
        return np.zeros(0, np.uint32)

    def parts() -> Iterator[tuple[int, Any, Any]]:
        for begin in range(0, len(stream.lengths), STRETCH):
            rows = slice(begin, begin + STRETCH)
            weights = stream.target_tokens[rows] if unit == "target_tokens" else stream.lengths[rows]
            bits = random_bits(len(weights), "subset", seed, epoch, stream.name, start=begin)
            yield begin, bits, (weights > 0).astype(np.uint32) if unit == "samples" else weights

    amounts = np.zeros(1 << 16)
    for _, bits, weights in parts():
        amounts += np.bincount(bits >> 16, weights, 1 << 16)
    last = min(int(np.searchsorted(np.cumsum(amounts), amount)), (1 << 16) - 1)
    below: list[Any] = []
    border: list[tuple[Any, Any, Any]] = []
    for begin, bits, weights in parts():
        candidates = stream.lengths[begin : begin + len(bits)] > 0
        below.append(np.flatnonzero(candidates & (bits >> 16 < last)) + begin)
        rows = np.flatnonzero(candidates & (bits >> 16 == last))
        border.append((rows + begin, bits[rows], weights[rows]))
    rows, bits, weights = (np.concatenate(columns) for columns in zip(*border, strict=True))
    order = np.argsort(bits, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(weights[order], dtype=np.float64)]) + amounts[:last].sum()
    some = rows[order[: int(np.argmin(np.abs(sums - amount)))]]
    return np.sort(np.concatenate([*below, some])).astype(np.uint32)


@dataclass(frozen=True)
class Row:
    """A canonical row: for each stream the stretch of its positions, and how many windows they are packed in."""

    number: int
    stretches: tuple[tuple[int, int], ...]
    windows: int

    @property
    def samples(self) -> int:
        return sum(end - begin for begin, end in self.stretches)


def rows_of(chosen: Sequence[Chosen], rows: int, window: int) -> list[Row]:
    """Cut the epoch into rows that share no shard, but for those at their ends. Raises ConfigError for an empty row."""
    result = []
    for number in range(rows):
        stretches = tuple((c.count * number // rows, c.count * (number + 1) // rows) for c in chosen)
        samples = sum(end - begin for begin, end in stretches)
        if not samples:
            total = sum(c.count for c in chosen)
            raise ConfigError(f"{total} samples an epoch do not make canonical_nodes: {rows} rows")
        result.append(Row(number, stretches, max(1, round(samples / window))))  # windows of equal size
    return result


def windows_of(
    streams: Sequence[StreamSamples], chosen: Sequence[Chosen], row: Row, seed: int, epoch: int, shuffle: bool
) -> Iterator[tuple[SampleIds, SampleIds]]:
    """The windows of a row, one after the other: sample ids, numbered through all streams, and their lengths; in random order."""
    total = sum(c.count for c in chosen)
    firsts = np.cumsum([0] + [len(stream.lengths) for stream in streams])
    at_once = max(1, STRETCH * row.windows // row.samples)
    for first in range(0, row.windows, at_once):
        last = min(first + at_once, row.windows)
        columns: list[tuple[Any, ...]] = []
        for stream, taken, stretch, offset in zip(streams, chosen, row.stretches, firsts, strict=False):
            block = max(SHUFFLE_BLOCK * taken.count / total, 2 * taken.largest_unit) if shuffle else 0
            ids, window, rank = _part(taken, stretch, (first, last), row.windows, block, seed, epoch)
            columns.append(((ids + offset).astype(np.uint32), stream.lengths[ids], window, rank))
        ids, lengths, window, rank = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(rank, kind="stable")
        order = order[np.argsort(window[order], kind="stable")]  # 16-bit keys: radix sorts
        ids, lengths = ids[order], lengths[order]
        ends = np.cumsum(np.bincount(window, minlength=last - first))
        for begin, end in zip(ends - np.diff(ends, prepend=0), ends, strict=True):
            yield ids[begin:end], lengths[begin:end]


def _part(
    taken: Chosen,
    stretch: tuple[int, int],
    windows: tuple[int, int],
    of: int,
    block: float,
    seed: int,
    epoch: int,
) -> tuple[Ids, npt.NDArray[np.uint16], Any]:
    """A stream's samples in windows [first, last) of a row: ids (n,), window (n,) counted from the first, rank in it (n,)."""
    begin, count = stretch[0], stretch[1] - stretch[0]
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint16)
    block = min(block, count)
    low = max(0, math.floor(windows[0] / of * count - block / 2) - 1)
    high = min(count, math.ceil(windows[1] / of * count + block / 2) + 1)
    places = np.arange(low, high) + 0.5  # in the stretch, from 0 to count
    rank: Any = places / count
    if block:
        bits = random_bits(high - low, "places", seed, epoch, taken.name, start=begin + low)
        places += (bits * 2.0**-32 - 0.5) * block
        places = np.abs(places)  # what would leave the row at an end comes back: the row stays evenly filled
        places = np.where(places > count, 2 * count - places, places)
        rank = bits.astype(np.uint16)  # lower half: says nothing of the place
    window = np.minimum((places * (of / count)).astype(np.int64), of - 1)
    mine = np.flatnonzero((window >= windows[0]) & (window < windows[1]))
    return (
        taken.ids(begin + low, begin + high)[mine],
        (window[mine] - windows[0]).astype(np.uint16),
        rank[mine],
    )

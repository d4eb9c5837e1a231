"""The epoch plan: which samples make up which pack, and in which order the packs are trained on.

    chosen samples -> canonical rows -> windows (order.py) -> packs (packing.py) -> global batches
        (batches.py)

A pure function of `Recipe`, the samples' lengths and the epoch; it does not depend on nodes, ranks and
workers. Global batch b of a run is packs [b * G, (b + 1) * G) of the plan, whatever the shape of the world
(`WorkerShare`).

**The number of packs is constant over epochs**, because Composer cuts every epoch to the first one's number
of batches without a word. It is epoch 0's, rounded down to a multiple of lcm(G, canonical nodes). Packs above
it are dropped, and reported; an epoch that has fewer gets its fullest packs cut in two: no sample is lost or
repeated.

Where batches are of one stream each (`batching_method: per_stream`), a row is packed in as many parts as
there are streams; otherwise it has one part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.dataset.kinds import KINDS
from unitoken.streaming_data.arrays import Floats, Integers, SampleIds
from unitoken.streaming_data.plan.batches import Surplus, deal, schedule_turns
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.mixing import mix
from unitoken.streaming_data.plan.order import (
    CanonicalRow,
    Chosen,
    choose_samples,
    epoch_amounts,
    random_order,
    rows_of,
    windows_of,
)
from unitoken.streaming_data.plan.packing import pack, split_packs
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.report import PlanReport, StreamShare, in_batches_of

# Packs in a global batch. In smaller ones whole packs are too coarse for the mixture: documents are mixed.
MIXED_BATCH = 32
PACKS_AT_ONCE = 1 << 18  # packs that are put in their final order at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An epoch. Pack p holds the samples `ids[offsets[p]:offsets[p + 1]]`, numbered through all streams."""

    ids: SampleIds
    offsets: npt.NDArray[np.unsignedinteger[Any]]  # (packs + 1,)
    squares: npt.NDArray[np.float32]  # (packs,) sum of the squares of the documents' lengths
    images: npt.NDArray[np.uint16]  # (packs,) images with continuous features
    report: PlanReport

    @property
    def packs(self) -> int:
        """Number of packs."""
        return len(self.offsets) - 1

    def samples_of(self, packs: Integers) -> tuple[Integers, list[int]]:
        """Return the samples of `packs` (n,) one after the other, and where each pack ends among them."""
        begins, ends = self.offsets[packs].astype(np.int64), self.offsets[packs + 1].astype(np.int64)
        borders = np.cumsum(ends - begins)
        places = np.arange(borders[-1]) + np.repeat(ends - borders, ends - begins)
        return self.ids[places].astype(np.int64), borders.tolist()


class Packs(NamedTuple):
    """Some packs: their samples, pack after pack, and how many each holds."""

    ids: SampleIds
    sizes: Any  # (packs,) integers


def build(recipe: Recipe, streams: Sequence[StreamSamples], epoch: int, first: PlanReport | None) -> Plan:
    """Make the plan of an epoch.

    Args:
        recipe: the settings that decide it.
        streams: the samples of each stream, as `read_lengths` returns them.
        epoch: from 0.
        first: the report of epoch 0; None for epoch 0 itself.

    Raises:
        ConfigError: the streams' weights choose no sample, or too few for a global batch.
    """
    if sum(len(stream.lengths) for stream in streams) >= 1 << 32:
        raise ConfigError(
            "more than 4,294,967,295 samples in all streams; plans hold sample numbers of 32 bits"
        )
    taken = epoch_amounts(streams, recipe.unit, recipe.size)
    chosen = [
        choose_samples(stream, amount, recipe.unit, recipe.seed, epoch, recipe.shuffle)
        for stream, amount in zip(streams, taken, strict=True)
    ]
    samples = sum(c.count for c in chosen)
    if not samples:
        raise ConfigError("the streams' weights choose no sample at all")
    epoch_packs = _pack_epoch(recipe, streams, chosen, epoch, first)
    ids, offsets = epoch_packs.ids, epoch_packs.offsets
    squares, images, shares = _measure(streams, ids, offsets, recipe.global_batch)
    packs = len(offsets) - 1
    total = max(sum(taken), 1e-9)
    report = PlanReport(
        recipe=recipe.hash,
        order=order_hash(ids, offsets),
        weights=weights_hash(squares, images),
        epoch=epoch,
        packs=packs,
        dropped_packs=epoch_packs.dropped,
        dropped_samples=samples - len(ids),
        split_packs=epoch_packs.split,
        fill=sum(share.tokens for share in shares) / (packs * recipe.packed_length),
        unit=recipe.unit,
        streams=tuple(
            share.model_copy(update={"asked": amount / total, "packs": of_stream})
            for share, amount, of_stream in zip(shares, taken, epoch_packs.of_streams, strict=True)
        ),
    )
    return Plan(ids, offsets, squares, images, report)


def order_hash(ids: Any, offsets: Any) -> str:
    """Return the hash of what is trained on, and when, which checkpoints keep."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<u4").data)
    digest.update(np.ascontiguousarray(offsets, "<u8").data)
    return digest.hexdigest()[:16]


def weights_hash(squares: Any, images: Any) -> str:
    """Return the hash of the weights by which ranks share the work."""
    digest = hashlib.sha256(np.ascontiguousarray(squares, "<f4").data)
    digest.update(np.ascontiguousarray(images, "<u2").data)
    return digest.hexdigest()[:16]


# --- The packs of an epoch


class _EpochPacks(NamedTuple):
    ids: SampleIds
    offsets: Any  # (packs + 1,)
    dropped: int  # packs
    split: int  # packs
    of_streams: Sequence[int | None]  # (streams,) packs, if each pack is of one stream


def _pack_epoch(
    recipe: Recipe,
    streams: Sequence[StreamSamples],
    chosen: Sequence[Chosen],
    epoch: int,
    first: PlanReport | None,
) -> _EpochPacks:
    """Pack all rows, give each part its constant number of packs, and put the packs in their final order."""
    nodes, group = recipe.canonical_nodes, _group(recipe)
    surplus = Surplus(len(KINDS) * len(streams) + 1)
    rows = [
        _pack_row(recipe, streams, chosen, row, surplus, epoch)
        for row in rows_of(chosen, nodes, recipe.window)
    ]
    counts = [[len(part.sizes) for part in row] for row in rows]  # (rows, parts)
    kept = _constant_counts(recipe, counts, first)
    for number, packs in enumerate(kept):
        made = sum(row[number] for row in counts)
        if made and not packs:
            stream = streams[number].name if len(kept) > 1 else None
            raise ConfigError(_too_few_packs(recipe, stream, sum(c.count for c in chosen), made))
    dropped = split = 0
    for row in rows:
        for number, part in enumerate(row):
            missing = kept[number] // nodes - len(part.sizes)
            split, dropped = split + max(missing, 0), dropped + max(-missing, 0)
            sizes = _split_last(recipe, part.sizes, max(missing, 0))[: kept[number] // nodes]
            row[number] = Packs(part.ids[: sizes.sum()], sizes)
    turns = schedule_turns([packs // group for packs in kept], "turns", recipe.seed, epoch)
    ids, offsets = _interleave([_take_turns(row, turns, group // nodes) for row in rows])
    of_streams = kept if recipe.batching_method == "per_stream" else [None] * len(streams)
    return _EpochPacks(ids, offsets, dropped, split, of_streams)


def _group(recipe: Recipe) -> int:
    """Return what the number of packs is a multiple of."""
    return math.lcm(recipe.global_batch, recipe.canonical_nodes)


def _constant_counts(recipe: Recipe, counts: list[list[int]], first: PlanReport | None) -> list[int]:
    """Return how many packs of each part the epoch has, over all rows.

    These are whole global batches, and equally many packs of every row.

    Args:
        recipe: the plan's.
        counts: (rows, parts) packs that were made.
        first: the report of epoch 0, whose numbers are those of all epochs; None for epoch 0 itself.
    """
    group = _group(recipe)
    if recipe.batching_method != "per_stream":
        return [first.packs if first is not None else sum(map(sum, counts)) // group * group]
    if first is not None:
        return [share.packs or 0 for share in first.streams]
    return [min(column) * recipe.canonical_nodes // group * group for column in zip(*counts, strict=True)]


def _too_few_packs(recipe: Recipe, stream: str | None, samples: int, packs: int) -> str:
    """Return the message for a part that makes less than one global batch; `stream` is None for the epoch."""
    if stream is None:
        what = (
            f"{samples} samples make {packs} packs of packed_length: {recipe.packed_length}; an epoch needs"
        )
    else:
        what = (
            f"stream '{stream}': its samples make {packs} packs of packed_length: {recipe.packed_length}; "
            "with batching_method: per_stream an epoch needs"
        )
    way_out = "`held_out`" if recipe.split == "held_out" else "`repeat` or `epoch_samples`"
    return (
        f"{what} at least {_group(recipe)}, the least common multiple of global_batch: {recipe.global_batch} "
        f"and canonical_nodes: {recipe.canonical_nodes}; lower data.global_batch to at most {packs}, "
        f"or raise {way_out}"
    )


def _split_last(recipe: Recipe, sizes: Integers, more: int) -> Integers:
    """Make `more` packs by splitting some of the last ones: the batches before stay as they were dealt."""
    if not more:
        return sizes
    sizes = sizes.astype(np.int64)
    if recipe.version == 2:
        return split_packs(sizes, more)
    last = len(sizes)
    while sizes[last:].sum() < len(sizes) - last + more:
        last = max(0, last - 4 * more)
    return np.concatenate([sizes[:last], split_packs(sizes[last:], more)])


# --- The packs of a row


class _Filled:
    """The packs of a part, collected window by window.

    Memory for all its samples is taken at once: a list of windows that is joined at the end would need twice
    as much.
    """

    def __init__(self, samples: int) -> None:
        self._ids, self._sizes = np.empty(samples, np.uint32), np.empty(samples, np.uint32)
        self._samples = self._packs = 0

    def append(self, packs: Packs) -> None:
        self._ids[self._samples : self._samples + len(packs.ids)] = packs.ids
        self._sizes[self._packs : self._packs + len(packs.sizes)] = packs.sizes
        self._samples += len(packs.ids)
        self._packs += len(packs.sizes)

    @property
    def packs(self) -> Packs:
        return Packs(self._ids[: self._samples], self._sizes[: self._packs])


def _pack_row(
    recipe: Recipe,
    streams: Sequence[StreamSamples],
    chosen: Sequence[Chosen],
    row: CanonicalRow,
    surplus: Surplus,
    epoch: int,
) -> list[Packs]:
    """Return the packs of a row, window after window, in one part or in a part for each stream."""
    batch = recipe.global_batch // math.gcd(recipe.global_batch, recipe.canonical_nodes)  # packs from a row
    firsts = _first_ids(streams)
    per_stream = recipe.batching_method == "per_stream"
    borders = list(itertools.pairwise(firsts.tolist())) if per_stream else [(0, int(firsts[-1]))]
    counts = [end - begin for begin, end in row.stretches] if per_stream else [row.samples]
    parts = [_Filled(count) for count in counts]
    placed = 0
    windows = windows_of(streams, chosen, row, recipe.seed, epoch, recipe.shuffle)
    for window, (all_ids, all_lengths) in enumerate(windows):
        for number, (begin, end) in enumerate(borders):
            inside: Any = (all_ids >= begin) & (all_ids < end) if per_stream else slice(None)
            ids, lengths = all_ids[inside], all_lengths[inside]
            name = (recipe.seed, epoch, row.number, window, *([streams[number].name] if per_stream else []))
            packs = _pack_window(ids, lengths, recipe, *name)
            if recipe.batching_method == "stratified" and recipe.shuffle and len(packs.ids):
                if recipe.global_batch <= MIXED_BATCH:
                    packs = _mix_documents(streams, packs, recipe.packed_length, name)
                order = deal(_pack_amounts(streams, packs), placed, batch, surplus, *name)
                packs = _reorder(packs, order)
            placed += len(packs.sizes)
            parts[number].append(packs)
    return [part.packs for part in parts]


def _pack_window(ids: SampleIds, lengths: SampleIds, recipe: Recipe, *name: Any) -> Packs:
    """Pack the samples of a window; without shuffle, the packs are in the order of their first samples."""
    order, sizes = pack(lengths, recipe.packed_length)
    if recipe.shuffle:
        permutation = random_order(len(sizes), "packs", *name)
    else:
        permutation = np.argsort(order[np.cumsum(sizes) - sizes], kind="stable")
    return _reorder(Packs(ids[order], sizes), permutation)


def _mix_documents(
    streams: Sequence[StreamSamples], packs: Packs, capacity: int, name: tuple[Any, ...]
) -> Packs:
    """Return as many packs with the same samples, each of which holds about the mixture."""
    packs_of = np.repeat(np.arange(len(packs.sizes)), packs.sizes)
    lengths, cells = np.zeros(len(packs.ids), np.int64), np.zeros(len(packs.ids), np.int64)
    for number, places, rows in samples_by_stream(streams, packs.ids):
        lengths[places] = streams[number].lengths[rows]
        cells[places] = len(KINDS) * number + streams[number].kinds[rows]
    packs_of = mix(lengths, cells, packs_of, capacity, *name)
    return Packs(packs.ids[np.argsort(packs_of, kind="stable")], np.bincount(packs_of))


def _pack_amounts(streams: Sequence[StreamSamples], packs: Packs) -> Integers:
    """Return what each pack holds: tokens of every stream and kind, and images, (3 * streams + 1, packs)."""
    count, packs_of = len(packs.sizes), np.repeat(np.arange(len(packs.sizes)), packs.sizes)
    tokens, images = np.zeros((len(streams), len(KINDS), count)), np.zeros(count)
    for number, places, rows in samples_by_stream(streams, packs.ids):
        stream = streams[number]
        cells = stream.kinds[rows] * np.int64(count) + packs_of[places]
        sums = np.bincount(cells, stream.lengths[rows], len(KINDS) * count)
        tokens[number] = sums.reshape(len(KINDS), count)
        images += np.bincount(packs_of[places], stream.images[rows], count)
    return np.vstack([tokens.reshape(-1, count), images]).astype(np.int64)


def _first_ids(streams: Sequence[StreamSamples]) -> Integers:
    """Return the number of each stream's first sample, and of all samples, (streams + 1,)."""
    return np.cumsum([0] + [len(stream.lengths) for stream in streams])


def samples_by_stream(
    streams: Sequence[StreamSamples], ids: SampleIds
) -> Iterator[tuple[int, Any, SampleIds]]:
    """Yield for each stream its number, the places of its samples in `ids`, and their rows in its sidecar."""
    for number, (begin, end) in enumerate(itertools.pairwise(_first_ids(streams).tolist())):
        places = np.flatnonzero((ids >= begin) & (ids < end)) if len(streams) > 1 else slice(None)
        yield number, places, ids[places] - np.uint32(begin)


# --- The final order


def _take_turns(parts: list[Packs], turns: Integers, each: int) -> Packs:
    """Join the parts of a row, taking `each` packs at every turn."""
    if len(parts) == 1:
        return parts[0]
    begins = np.cumsum([0] + [len(part.sizes) for part in parts])[turns]
    turn_of_part = np.empty(len(turns), np.int64)  # how many turns the part had before
    order = np.argsort(turns, kind="stable")
    counts = np.bincount(turns, minlength=len(parts))
    turn_of_part[order] = np.arange(len(turns)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = ((begins + turn_of_part * each)[:, None] + np.arange(each)).reshape(-1)
    return _reorder(_join(parts), places)


def _join(parts: Sequence[Packs]) -> Packs:
    sizes = np.concatenate([part.sizes for part in parts])
    return Packs(np.concatenate([part.ids for part in parts]), sizes.astype(np.int64))


def _reorder(packs: Packs, permutation: Integers) -> Packs:
    """Return the packs in another order."""
    starts, sizes = (np.cumsum(packs.sizes) - packs.sizes)[permutation], packs.sizes[permutation]
    shift = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return Packs(packs.ids[np.arange(len(packs.ids)) + shift], sizes)


def _interleave(rows: list[Packs]) -> tuple[SampleIds, Any]:
    """Deal the packs of the rows (equally many each) in turn: pack 0 of each row, pack 1 of each row, ...

    Returns:
        The samples, and the packs' offsets (packs + 1,).
    """
    each = len(rows[0].sizes)
    sizes = rows[0].sizes if len(rows) == 1 else np.stack([row.sizes for row in rows], axis=1).reshape(-1)
    offsets: Any = np.zeros(len(sizes) + 1, np.uint32 if sizes.sum(dtype=np.int64) < 1 << 32 else np.uint64)
    np.cumsum(sizes, dtype=offsets.dtype, out=offsets[1:])
    if len(rows) == 1:
        return rows[0].ids, offsets
    ids = np.empty(int(offsets[-1]), np.uint32)
    done = [0] * len(rows)  # samples
    for begin in range(0, each, PACKS_AT_ONCE):
        end = min(begin + PACKS_AT_ONCE, each)
        parts = []
        for number, row in enumerate(rows):
            taken = int(row.sizes[begin:end].sum())
            parts.append(Packs(row.ids[done[number] : done[number] + taken], row.sizes[begin:end]))
            done[number] += taken
        permutation = np.arange((end - begin) * len(rows)).reshape(len(rows), -1).T.reshape(-1)
        dealt = _reorder(_join(parts), permutation)
        ids[int(offsets[begin * len(rows)]) : int(offsets[end * len(rows)])] = dealt.ids
    return ids, offsets


# --- The report


class _Sums:
    """Sums over the samples of each stream that an epoch takes."""

    def __init__(self, streams: int, batches: int) -> None:
        self.samples, self.tokens = np.zeros(streams, np.int64), np.zeros(streams, np.int64)
        self.target_tokens, self.squares = np.zeros(streams, np.int64), np.zeros(streams, np.int64)
        self.batch_tokens: Floats = np.zeros((streams, batches))


def _measure(
    streams: Sequence[StreamSamples], ids: SampleIds, offsets: Any, batch: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], list[StreamShare]]:
    """Return each pack's squares and images, and what each stream contributes to the epoch."""
    packs = len(offsets) - 1
    squares, images = np.empty(packs, np.float32), np.empty(packs, np.uint16)
    sums = _Sums(len(streams), packs // batch)
    for begin in range(0, packs, PACKS_AT_ONCE):
        end = min(begin + PACKS_AT_ONCE, packs)
        some = ids[int(offsets[begin]) : int(offsets[end])]
        sizes = np.diff(offsets[begin : end + 1].astype(np.int64))
        batches = np.repeat((np.arange(begin, end) // batch).astype(np.int32), sizes)
        lengths, sample_images = np.empty(len(some), np.float64), np.empty(len(some), np.int64)
        for number, places, rows in samples_by_stream(streams, some):
            stream = streams[number]
            own = lengths[places] = stream.lengths[rows]
            sample_images[places] = stream.images[rows]
            sums.samples[number] += len(rows)
            sums.tokens[number] += int(own.sum(dtype=np.int64))
            sums.target_tokens[number] += int(stream.target_tokens[rows].sum(dtype=np.int64))
            sums.squares[number] += int((own * own.astype(np.uint64)).sum())
            first, last = begin // batch, (end - 1) // batch
            counted = np.bincount(batches[places] - first, own, last - first + 1)
            sums.batch_tokens[number, first : last + 1] += counted
        starts = (offsets[begin:end] - offsets[begin]).astype(np.int64)
        squares[begin:end] = np.add.reduceat(lengths * lengths, starts)
        images[begin:end] = np.add.reduceat(sample_images, starts)
    return squares, images, [_share(stream, number, sums) for number, stream in enumerate(streams)]


def _share(stream: StreamSamples, number: int, sums: _Sums) -> StreamShare:
    return StreamShare(
        name=stream.name,
        over_long=stream.over_long,
        cut=stream.cut,
        filtered=stream.filtered,
        held_out=stream.held_out,
        stored=len(stream.lengths),
        samples=int(sums.samples[number]),
        tokens=int(sums.tokens[number]),
        target_tokens=int(sums.target_tokens[number]),
        in_batches=in_batches_of(sums.batch_tokens, number, sums.squares.tolist()),
    )

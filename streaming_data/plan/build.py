"""The epoch plan: which samples make up which pack, and in which order the packs are trained on.

    chosen samples -> canonical rows -> windows (order.py) -> packs (packing.py) -> packs of global batch 0, 1, 2, ... (batches.py)

A pure function of `Recipe`, the samples' lengths and the epoch; nodes, ranks and workers of the day have no part in it. Global
batch b of a run is packs [b * G, (b + 1) * G) of the plan, whatever the shape of the world (`Share`).

**The number of packs is constant over epochs**, because Composer cuts every epoch to the first one's number of batches
without a word. It is epoch 0's, rounded down to a multiple of lcm(G, canonical nodes). What an epoch has above it is
dropped, and reported; an epoch that comes out below it has its fullest packs cut in two: no sample is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.streaming_data.plan.batches import Surplus, deal, scheduled
from unitoken.streaming_data.plan.lengths import KINDS, StreamSamples
from unitoken.streaming_data.plan.mixing import mix
from unitoken.streaming_data.plan.order import (
    Row,
    SampleIds,
    amounts,
    choose,
    random_order,
    rows_of,
    windows_of,
)
from unitoken.streaming_data.plan.packing import pack, split_packs
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.report import PlanReport, StreamShare, in_batches_of

MIXED_BATCH = (
    32  # packs: in smaller batches whole packs are too coarse for the mixture, and are mixed themselves
)
AT_ONCE = 1 << 18  # packs that are put in their final order at a time

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An epoch. Pack p holds the samples `ids[offsets[p]:offsets[p + 1]]`, numbered through all streams."""

    ids: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.unsignedinteger[Any]]  # (packs + 1,)
    squares: npt.NDArray[np.float32]  # (packs,) sum of the squares of the documents' lengths
    images: npt.NDArray[np.uint16]  # (packs,) that bring features
    report: PlanReport

    @property
    def packs(self) -> int:
        return len(self.offsets) - 1

    def samples_of(self, packs: Ids) -> tuple[Ids, list[int]]:
        """The samples of `packs` (n,) one after the other, and where each pack ends among them."""
        begins, ends = self.offsets[packs].astype(np.int64), self.offsets[packs + 1].astype(np.int64)
        borders = np.cumsum(ends - begins)
        places = np.arange(borders[-1]) + np.repeat(ends - borders, ends - begins)
        return self.ids[places].astype(np.int64), borders.tolist()


def build(recipe: Recipe, streams: Sequence[StreamSamples], epoch: int, first: PlanReport | None) -> Plan:
    """Make the plan of an epoch. `first` is epoch 0's report, None for epoch 0 itself. Raises ConfigError."""
    nodes, group = recipe.canonical_nodes, math.lcm(recipe.global_batch, recipe.canonical_nodes)
    if sum(len(stream.lengths) for stream in streams) >= 1 << 32:
        raise ConfigError(
            "more than 4,294,967,295 samples in all streams; plans hold sample numbers of 32 bits"
        )
    wanted = amounts(streams, recipe.unit, recipe.size)
    chosen = [
        choose(stream, amount, recipe.unit, recipe.seed, epoch, recipe.shuffle)
        for stream, amount in zip(streams, wanted, strict=True)
    ]
    if not (samples := sum(c.count for c in chosen)):
        raise ConfigError("the streams' weights choose no sample at all")
    surplus = Surplus(len(KINDS) * len(streams) + 1)
    rows = [
        _pack_row(
            recipe,
            streams,
            windows_of(streams, chosen, row, recipe.seed, epoch, recipe.shuffle),
            surplus,
            epoch,
            row,
        )
        for row in rows_of(chosen, nodes, recipe.window)
    ]
    found = [[len(sizes) for _, sizes in row] for row in rows]  # (rows, parts)
    kept = _kept(recipe, found, first)  # (parts,) packs of all rows together
    if any(not packs and any(row[part] for row in found) for part, packs in enumerate(kept)):
        raise ConfigError(_too_few(recipe, streams, samples, found, kept, group))
    dropped = split = 0
    for row in rows:
        for number, (ids, sizes) in enumerate(row):
            more = kept[number] // nodes - len(sizes)
            split, dropped = split + max(more, 0), dropped + max(-more, 0)
            sizes = _split(recipe, sizes, max(more, 0))[: kept[number] // nodes]
            row[number] = ids[: sizes.sum()], sizes
    turns = scheduled([packs // group for packs in kept], "turns", recipe.seed, epoch)
    ids, offsets = _interleave([_in_turns(row, turns, group // nodes) for row in rows])
    del rows
    packs = len(offsets) - 1
    squares, images, shares = _weigh(streams, ids, offsets, recipe.global_batch)
    if recipe.batching_method == "per_stream":
        shares = [
            share.model_copy(update={"packs": packs}) for share, packs in zip(shares, kept, strict=True)
        ]
    asked = [amount / max(sum(wanted), 1e-9) for amount in wanted]
    report = PlanReport(
        recipe=recipe.hash,
        order=order_of(ids, offsets),
        weights=weights_of(squares, images),
        epoch=epoch,
        packs=packs,
        dropped_packs=dropped,
        dropped_samples=samples - len(ids),
        split_packs=split,
        fill=sum(share.tokens for share in shares) / (packs * recipe.packed_length),
        unit=recipe.unit,
        streams=tuple(
            share.model_copy(update={"asked": part}) for share, part in zip(shares, asked, strict=True)
        ),
    )
    return Plan(ids, offsets, squares, images, report)


def order_of(ids: Any, offsets: Any) -> str:
    """What is trained on, and when; checkpoints keep it."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<u4").data)
    digest.update(np.ascontiguousarray(offsets, "<u8").data)
    return digest.hexdigest()[:16]


def weights_of(squares: Any, images: Any) -> str:
    """What ranks share the work by."""
    digest = hashlib.sha256(np.ascontiguousarray(squares, "<f4").data)
    digest.update(np.ascontiguousarray(images, "<u2").data)
    return digest.hexdigest()[:16]


Part = tuple[npt.NDArray[np.uint32], Any]  # sample ids, pack after pack, and the packs' sizes


def _pack_row(
    recipe: Recipe,
    streams: Sequence[StreamSamples],
    windows: Iterable[tuple[SampleIds, SampleIds]],
    surplus: Surplus,
    epoch: int,
    row: Row,
) -> list[Part]:
    """The packs of a row, window after window: in one part, or a part for each stream where batches are of one stream."""
    batch = recipe.global_batch // math.gcd(
        recipe.global_batch, recipe.canonical_nodes
    )  # packs that it takes of a row
    firsts = np.cumsum([0] + [len(stream.lengths) for stream in streams])
    per_stream = recipe.batching_method == "per_stream"
    borders = list(itertools.pairwise(firsts.tolist())) if per_stream else [(0, int(firsts[-1]))]
    # Room for all samples of each part, filled as they come: as a list of windows and then in one they would be there twice.
    counts = [end - begin for begin, end in row.stretches] if per_stream else [row.samples]
    parts = [
        (np.empty(count, np.uint32), np.empty(count, np.uint32)) for count in counts
    ]  # ids, and packs' sizes
    filled = [[0, 0] for _ in counts]
    placed = 0
    for window, (all_ids, all_lengths) in enumerate(windows):
        for number, (begin, end) in enumerate(borders):
            mine: Any = (all_ids >= begin) & (all_ids < end) if per_stream else slice(None)
            ids, lengths = all_ids[mine], all_lengths[mine]
            name = (recipe.seed, epoch, row.number, window, *([streams[number].name] if per_stream else []))
            ids, sizes = _pack_window(ids, lengths, recipe, *name)
            if recipe.batching_method == "stratified" and recipe.shuffle and len(ids):
                if recipe.global_batch <= MIXED_BATCH:
                    ids, sizes = _mixed(streams, firsts, ids, sizes, recipe.packed_length, name)
                order = deal(_amounts(streams, firsts, ids, sizes), placed, batch, surplus, *name)
                ids, sizes = _reorder(ids, sizes, order)
            placed += len(sizes)
            for column, (values, room) in enumerate(zip((ids, sizes), parts[number], strict=True)):
                at = filled[number][column]
                filled[number][column] = at + len(values)
                room[at : at + len(values)] = values
    return [
        (ids[:samples], sizes[:packs]) for (ids, sizes), (samples, packs) in zip(parts, filled, strict=True)
    ]


def _pack_window(ids: SampleIds, lengths: SampleIds, recipe: Recipe, *name: Any) -> Part:
    """Samples -> ids pack after pack, and the packs' sizes; the packs in random order, or in that of their first samples."""
    order, sizes = pack(lengths, recipe.packed_length)
    if recipe.shuffle:
        permutation = random_order(len(sizes), "packs", *name)
    else:
        permutation = np.argsort(order[np.cumsum(sizes) - sizes], kind="stable")
    return _reorder(ids[order], sizes, permutation)


def _mixed(
    streams: Sequence[StreamSamples],
    firsts: Ids,
    ids: SampleIds,
    sizes: Ids,
    capacity: int,
    name: tuple[Any, ...],
) -> Part:
    """As many packs with the same samples, of which each holds about the mixture."""
    packs_of = np.repeat(np.arange(len(sizes)), sizes)
    lengths, cells = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    for number, mine, rows in _by_stream(firsts, ids):
        lengths[mine], cells[mine] = (
            streams[number].lengths[rows],
            len(KINDS) * number + streams[number].kinds[rows],
        )
    packs_of = mix(lengths, cells, packs_of, capacity, *name)
    return ids[np.argsort(packs_of, kind="stable")], np.bincount(packs_of)


def _amounts(streams: Sequence[StreamSamples], firsts: Ids, ids: SampleIds, sizes: Ids) -> Ids:
    """What each pack holds: tokens of every stream and kind, and images: (3 * streams + 1, packs)."""
    packs, packs_of = len(sizes), np.repeat(np.arange(len(sizes)), sizes)
    tokens, images = np.zeros((len(streams), len(KINDS), packs)), np.zeros(packs)
    for number, mine, rows in _by_stream(firsts, ids):
        cells = streams[number].kinds[rows] * np.int64(packs) + packs_of[mine]
        tokens[number] = np.bincount(cells, streams[number].lengths[rows], len(KINDS) * packs).reshape(
            len(KINDS), packs
        )
        images += np.bincount(packs_of[mine], streams[number].images[rows], packs)
    return np.vstack([tokens.reshape(-1, packs), images]).astype(np.int64)


def _by_stream(firsts: Ids, ids: SampleIds) -> Iterator[tuple[int, Any, SampleIds]]:
    """Of each stream: its number, where its samples stand in `ids`, and their rows in its sidecar."""
    for number, (begin, end) in enumerate(itertools.pairwise(firsts.tolist())):
        mine = np.flatnonzero((ids >= begin) & (ids < end)) if len(firsts) > 2 else slice(None)
        yield number, mine, ids[mine] - np.uint32(begin)


def _kept(recipe: Recipe, found: list[list[int]], first: PlanReport | None) -> list[int]:
    """How many packs of each part the epoch has: whole global batches and as many of every row; in all epochs epoch 0's."""
    group = math.lcm(recipe.global_batch, recipe.canonical_nodes)
    if recipe.batching_method != "per_stream":
        return [first.packs if first is not None else sum(map(sum, found)) // group * group]
    if first is not None:
        return [share.packs or 0 for share in first.streams]
    return [min(column) * recipe.canonical_nodes // group * group for column in zip(*found, strict=True)]


def _too_few(
    recipe: Recipe,
    streams: Sequence[StreamSamples],
    samples: int,
    found: list[list[int]],
    kept: list[int],
    group: int,
) -> str:
    part = next(part for part, packs in enumerate(kept) if not packs and any(row[part] for row in found))
    of_stream = f"stream '{streams[part].name}': " if len(kept) > 1 else ""
    what = "with batching_method: per_stream an epoch needs" if len(kept) > 1 else "an epoch needs"
    count = (
        f"its samples make {sum(row[part] for row in found)}"
        if of_stream
        else f"{samples} samples make {sum(map(sum, found))}"
    )
    way_out = "`held_out`" if recipe.split == "held_out" else "`repeat` or `epoch_samples`"
    return (
        f"{of_stream}{count} packs of packed_length: {recipe.packed_length}; {what} at least {group}, "
        f"the least common multiple of global_batch: {recipe.global_batch} and canonical_nodes: {recipe.canonical_nodes}; "
        f"lower data.global_batch, or raise {way_out}"
    )


def _split(recipe: Recipe, sizes: Ids, more: int) -> Ids:
    """Make `more` packs of the last ones, so that the batches before stay as they were dealt."""
    if not more:
        return sizes
    sizes = sizes.astype(np.int64)
    if recipe.version == 2:
        return split_packs(sizes, more)
    last = len(sizes)
    while sizes[last:].sum() < len(sizes) - last + more:
        last = max(0, last - 4 * more)
    return np.concatenate([sizes[:last], split_packs(sizes[last:], more)])


def _in_turns(parts: list[Part], turns: Ids, each: int) -> Part:
    """The parts of a row in one, `each` packs in turn."""
    if len(parts) == 1:
        return parts[0]
    begins = np.cumsum([0] + [len(sizes) for _, sizes in parts])[turns]
    seen = np.empty(len(turns), np.int64)
    order = np.argsort(turns, kind="stable")
    counts = np.bincount(turns, minlength=len(parts))
    seen[order] = np.arange(len(turns)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = ((begins + seen * each)[:, None] + np.arange(each)).reshape(-1)
    ids, sizes = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return _reorder(ids, sizes.astype(np.int64), places)


def _reorder(ids: SampleIds, sizes: Ids, permutation: Ids) -> Part:
    """The packs in another order."""
    starts, new_sizes = (np.cumsum(sizes) - sizes)[permutation], sizes[permutation]
    shift = np.repeat(starts - (np.cumsum(new_sizes) - new_sizes), new_sizes)
    return ids[np.arange(len(ids)) + shift], new_sizes


def _interleave(rows: list[Part]) -> tuple[SampleIds, Any]:
    """Deal the packs of the rows (equally many each) in turn: pack 0 of each row, pack 1 of each row, ... With offsets."""
    each = len(rows[0][1])
    sizes = rows[0][1] if len(rows) == 1 else np.stack([sizes for _, sizes in rows], axis=1).reshape(-1)
    offsets: Any = np.zeros(len(sizes) + 1, np.uint32 if sizes.sum(dtype=np.int64) < 1 << 32 else np.uint64)
    np.cumsum(sizes, dtype=offsets.dtype, out=offsets[1:])
    if len(rows) == 1:
        return rows[0][0], offsets
    ids = np.empty(int(offsets[-1]), np.uint32)
    done = [0] * len(rows)
    for begin in range(0, each, AT_ONCE):
        end = min(begin + AT_ONCE, each)
        parts = []
        for number, (row, row_sizes) in enumerate(rows):
            taken = int(row_sizes[begin:end].sum())
            parts.append((row[done[number] : done[number] + taken], row_sizes[begin:end].astype(np.int64)))
            done[number] += taken
        permutation = np.arange((end - begin) * len(rows)).reshape(len(rows), -1).T.reshape(-1)
        some, _ = _reorder(
            np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), permutation
        )
        ids[int(offsets[begin * len(rows)]) : int(offsets[end * len(rows)])] = some
    return ids, offsets


def _weigh(
    streams: Sequence[StreamSamples], ids: SampleIds, offsets: Any, batch: int
) -> tuple[Any, Any, list[StreamShare]]:
    """Each pack's squares and images, and what each stream has in all of them and in each global batch."""
    packs = len(offsets) - 1
    squares, images = np.empty(packs, np.float32), np.empty(packs, np.uint16)
    firsts = np.cumsum([0] + [len(stream.lengths) for stream in streams])
    sums = np.zeros((len(streams), 4), np.int64)  # samples, tokens, target tokens, squares of lengths
    in_batches = np.zeros((len(streams), packs // batch))  # tokens
    for begin in range(0, packs, AT_ONCE):
        end = min(begin + AT_ONCE, packs)
        some = ids[int(offsets[begin]) : int(offsets[end])]
        sizes = np.diff(offsets[begin : end + 1].astype(np.int64))
        batches = np.repeat((np.arange(begin, end) // batch).astype(np.int32), sizes)
        lengths, of_images = np.empty(len(some), np.float64), np.empty(len(some), np.int64)
        for number, mine, rows in _by_stream(firsts, some):
            stream = streams[number]
            own = lengths[mine] = stream.lengths[rows]
            of_images[mine] = stream.images[rows]
            square = int((own * own.astype(np.uint64)).sum())
            sums[number] += (
                len(rows),
                int(own.sum(dtype=np.int64)),
                int(stream.target_tokens[rows].sum(dtype=np.int64)),
                square,
            )
            first, last = begin // batch, (end - 1) // batch
            in_batches[number, first : last + 1] += np.bincount(batches[mine] - first, own, last - first + 1)
        starts = (offsets[begin:end] - offsets[begin]).astype(np.int64)
        squares[begin:end] = np.add.reduceat(lengths * lengths, starts)
        images[begin:end] = np.add.reduceat(of_images, starts)
    shares = [
        StreamShare(
            name=stream.name,
            over_long=stream.over_long,
            cut=stream.cut,
            filtered=stream.filtered,
            held_out=stream.held_out,
            stored=len(stream.lengths),
            samples=int(counts[0]),
            tokens=int(counts[1]),
            target_tokens=int(counts[2]),
            in_batches=in_batches_of(in_batches, number, sums[:, 3].tolist()),
        )
        for number, (stream, counts) in enumerate(zip(streams, sums, strict=True))
    ]
    return squares, images, shares

"""The epoch plan: which samples make up which pack, and in which order the packs are trained on.

    chosen samples -> canonical rows -> windows (order.py) -> packs (packing.py) -> packs of global batch 0, 1, 2, ...

A pure function of `Recipe`, the samples' lengths and the epoch; nodes, ranks and workers of the day have no part in it. Global
batch b of a run is packs [b * G, (b + 1) * G) of the plan, whatever the shape of the world (`Share`).

**The number of packs is constant over epochs**, because Composer cuts every epoch to the first one's number of batches
without a word. It is epoch 0's, rounded down to a multiple of lcm(G, canonical nodes). What an epoch has above it is
dropped, and reported; an epoch that comes out below it has its fullest packs cut in two: no sample is lost or repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.streaming_data.balance import balance
from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.files import AsideFolder, locked, remove_abandoned
from unitoken.streaming_data.lengths import StreamSamples
from unitoken.streaming_data.order import amounts, choose, random_order, rows_of, windows_of
from unitoken.streaming_data.packing import pack, split_packs
from unitoken.streaming_data.recipe import Recipe
from unitoken.streaming_data.report import Report, StreamShare

AT_ONCE = 1 << 18  # packs that are put in their final order at a time
ARRAYS = ("ids", "offsets", "squares", "images")  # the files of a saved plan
KEPT_SECONDS = 30 * 86400.0  # after its last use; one that is needed again is made again, and is the same

Ids = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An epoch. Pack p holds the samples `ids[offsets[p]:offsets[p + 1]]`, numbered through all streams."""

    ids: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.unsignedinteger[Any]]  # (packs + 1,)
    squares: npt.NDArray[np.float32]  # (packs,) sum of the squares of the documents' lengths
    images: npt.NDArray[np.uint16]  # (packs,) that bring features
    report: Report

    @property
    def packs(self) -> int:
        return len(self.offsets) - 1

    def samples_of(self, packs: Ids) -> tuple[Ids, list[int]]:
        """The samples of `packs` (n,) one after the other, and where each pack ends among them."""
        begins, ends = self.offsets[packs].astype(np.int64), self.offsets[packs + 1].astype(np.int64)
        borders = np.cumsum(ends - begins)
        places = np.arange(borders[-1]) + np.repeat(ends - borders, ends - begins)
        return self.ids[places].astype(np.int64), borders.tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
    """The packs that one worker of one rank reads, in its order, after `seen` packs of the epoch.

    Within a rank, worker w of W reads the batches w, w + W, ...: the order in which a DataLoader asks its workers. With as many
    canonical rows as nodes (or a multiple), each node keeps to its own rows and so to its own shards, and the work is
    balanced among its ranks; otherwise among all ranks.
    """

    plan: Plan
    seen: int
    nodes: int
    ranks_per_node: int
    rank: int
    batch_packs: int
    canonical_nodes: int = 1
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        assert not self.seen % self.global_batch, "checked where the state is loaded"
        assert not self.plan.packs % self.global_batch, "so the plan is made"

    @property
    def global_batch(self) -> int:
        return self.nodes * self.ranks_per_node * self.batch_packs

    def __len__(self) -> int:
        """Batches of this worker."""
        return len(range(self.worker, (self.plan.packs - self.seen) // self.global_batch, self.workers))

    def __iter__(self) -> Iterator[Ids]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Ids:
        """(batch_packs,) the packs of this worker's batch `number`; where there is a choice, from heavy to light."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = self.seen + (self.worker + number * self.workers) * self.global_batch
        packs = np.arange(begin, begin + self.global_batch)
        rank, ranks = self.rank, self.nodes * self.ranks_per_node
        if self.canonical_nodes % self.nodes == 0:
            node, rank = divmod(self.rank, self.ranks_per_node)
            packs, ranks = packs[node :: self.nodes], self.ranks_per_node
        if ranks == 1:
            return packs
        mine: Ids = packs[balance(self.plan.squares[packs], self.plan.images[packs], ranks)[rank]]
        return mine


def build(recipe: Recipe, streams: Sequence[StreamSamples], epoch: int, packs: int | None) -> Plan:
    """Make the plan of an epoch. `packs` is epoch 0's number of them; None for epoch 0 itself. Raises ConfigError."""
    nodes, group = recipe.canonical_nodes, math.lcm(recipe.global_batch, recipe.canonical_nodes)
    if sum(len(stream.lengths) for stream in streams) >= 1 << 32:
        raise ConfigError("more than 4,294,967,295 samples in all streams; plans hold sample numbers of 32 bits")
    wanted = amounts(streams, recipe.unit, recipe.size)
    chosen = [
        choose(stream, amount, recipe.unit, recipe.seed, epoch, recipe.shuffle)
        for stream, amount in zip(streams, wanted, strict=True)
    ]
    if not (samples := sum(c.count for c in chosen)):
        raise ConfigError("the streams' weights choose no sample at all")
    rows: list[tuple[npt.NDArray[np.uint32], Ids]] = []
    for row in rows_of(chosen, nodes, recipe.window):
        row_ids = np.empty(sum(end - begin for begin, end in row.stretches), np.uint32)
        filled, all_sizes = 0, []
        for number, (ids, lengths) in enumerate(windows_of(streams, chosen, row, recipe.seed, epoch, recipe.shuffle)):
            row_ids[filled : filled + len(ids)], sizes = _pack_window(ids, lengths, recipe, epoch, row.number, number)
            filled += len(ids)
            all_sizes.append(sizes)
        rows.append((row_ids, np.concatenate(all_sizes)))
    found = sum(len(sizes) for _, sizes in rows)
    packs = packs or found // group * group
    if packs == 0:
        way_out = "`held_out`" if recipe.split == "held_out" else "`repeat` or `epoch_samples`"
        raise ConfigError(
            f"{samples} samples make {found} packs of packed_length: {recipe.packed_length}; an epoch needs at least {group}, "
            f"the least common multiple of global_batch: {recipe.global_batch} and canonical_nodes: {nodes}; "
            f"lower data.global_batch, or raise {way_out}"
        )
    dropped = split = 0
    for number, (ids, sizes) in enumerate(rows):
        more = packs // nodes - len(sizes)
        split, dropped = split + max(more, 0), dropped + max(-more, 0)
        sizes = split_packs(sizes, max(more, 0))[: packs // nodes]
        rows[number] = ids[: sizes.sum()], sizes
    ids, offsets = _interleave(rows)
    del rows
    squares, images, shares = _weigh(streams, ids, offsets)
    asked = [amount / max(sum(wanted), 1e-9) for amount in wanted]
    order = hashlib.sha256(np.ascontiguousarray(ids, "<u4").data)
    order.update(np.ascontiguousarray(offsets, "<u8").data)
    report = Report(
        recipe=recipe.hash,
        order=order.hexdigest()[:16],
        epoch=epoch,
        packs=packs,
        dropped_packs=dropped,
        dropped_samples=samples - len(ids),
        split_packs=split,
        fill=sum(share.tokens for share in shares) / (packs * recipe.packed_length),
        unit=recipe.unit,
        streams=tuple(share.model_copy(update={"asked": part}) for share, part in zip(shares, asked, strict=True)),
    )
    return Plan(ids, offsets, squares, images, report)


def load_or_build(folder: Path, recipe: Recipe, epoch: int, streams: Callable[[], Sequence[StreamSamples]]) -> Plan:
    """The plan of an epoch, memory-mapped from `folder`; made there first, by one process, where it is missing.

    `streams` is asked for the lengths only where the plan has to be made.
    """
    packs = load_or_build(folder, recipe, 0, streams).packs if epoch else None
    place = folder / recipe.hash / f"epoch-{epoch:06d}"
    if not place.exists():
        with locked(folder / recipe.hash / "lock"):
            if not place.exists():
                _remove_unused(folder)
                _save(build(recipe, streams(), epoch, packs), place)
    os.utime(place)
    arrays = {name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}  # memmap's own slices are slow
    return Plan(report=Report.model_validate_json((place / "report.json").read_bytes()), **arrays)


def _remove_unused(folder: Path) -> None:
    for recipe in folder.iterdir():
        remove_abandoned(recipe)  # what killed builders left
    for place in folder.glob("*/epoch-*"):
        with contextlib.suppress(FileNotFoundError):  # by another process
            if time.time() - place.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(place)


def _save(plan: Plan, place: Path) -> None:
    with AsideFolder(place) as folder:
        for name in ARRAYS:
            np.save(folder.path / f"{name}.npy", getattr(plan, name))
        (folder.path / "report.json").write_text(plan.report.model_dump_json(indent=1))
        folder.publish()


def _pack_window(
    ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.uint32], recipe: Recipe, epoch: int, row: int, window: int
) -> tuple[npt.NDArray[np.uint32], Ids]:
    """Samples -> ids pack after pack, and the packs' sizes; the packs in random order, or in that of their first samples."""
    order, sizes = pack(lengths, recipe.packed_length)
    if recipe.shuffle:
        permutation = random_order(len(sizes), "packs", recipe.seed, epoch, row, window)
    else:
        permutation = np.argsort(order[np.cumsum(sizes) - sizes], kind="stable")
    packed, sizes = _reorder(ids[order], sizes, permutation)
    return packed, sizes.astype(np.uint32)


def _reorder(ids: npt.NDArray[np.uint32], sizes: Ids, permutation: Ids) -> tuple[npt.NDArray[np.uint32], Ids]:
    """The packs in another order."""
    starts, new_sizes = (np.cumsum(sizes) - sizes)[permutation], sizes[permutation]
    shift = np.repeat(starts - (np.cumsum(new_sizes) - new_sizes), new_sizes)
    return ids[np.arange(len(ids)) + shift], new_sizes


def _interleave(rows: list[tuple[npt.NDArray[np.uint32], Ids]]) -> tuple[npt.NDArray[np.uint32], Any]:
    """Deal the packs of the rows (equally many each) in turn: pack 0 of each row, pack 1 of each row, ... With offsets."""
    each = len(rows[0][1])
    sizes = np.stack([sizes for _, sizes in rows], axis=1).reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.uint64)])
    offsets = offsets.astype(np.uint32 if int(offsets[-1]) < 1 << 32 else np.uint64)
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
        some, _ = _reorder(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), permutation)
        ids[int(offsets[begin * len(rows)]) : int(offsets[end * len(rows)])] = some
    return ids, offsets


def _weigh(streams: Sequence[StreamSamples], ids: npt.NDArray[np.uint32], offsets: Any) -> tuple[Any, Any, list[StreamShare]]:
    """Each pack's squares and images, and what each stream has in all of them."""
    packs = len(offsets) - 1
    squares, images = np.empty(packs, np.float32), np.empty(packs, np.uint16)
    firsts = np.cumsum([0] + [len(stream.lengths) for stream in streams])
    sums = np.zeros((len(streams), 3), np.int64)  # samples, tokens, target tokens
    for begin in range(0, packs, AT_ONCE):
        end = min(begin + AT_ONCE, packs)
        some = ids[int(offsets[begin]) : int(offsets[end])]
        lengths, of_images = np.empty(len(some), np.float64), np.empty(len(some), np.int64)
        for number, stream in enumerate(streams):
            mine: Any = slice(None)
            if len(streams) > 1:
                mine = np.flatnonzero((some >= firsts[number]) & (some < firsts[number + 1]))
            rows = some[mine] - np.uint32(firsts[number])
            lengths[mine], of_images[mine] = stream.lengths[rows], stream.images[rows]
            sums[number] += len(rows), int(lengths[mine].sum()), int(stream.target_tokens[rows].sum(dtype=np.int64))
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
        )
        for stream, counts in zip(streams, sums, strict=True)
    ]
    return squares, images, shares

"""The epoch plan: which samples make up which pack, and in which order the packs are trained on.

    chosen samples -> upstream's order -> canonical rows -> windows -> packs -> packs of global batch 0, 1, 2, ...

A pure function of `Recipe`, the samples' lengths and the epoch; nodes, ranks and workers of the day have no part in it. Global
batch b of a run is packs [b * G, (b + 1) * G) of the plan, whatever the shape of the world (`partition`).

**The number of packs is constant over epochs**, because Composer cuts every epoch to the first one's number of batches
without a word. It is epoch 0's, rounded down to a multiple of lcm(G, canonical nodes). What an epoch has above it is
dropped, and reported; an epoch that comes out below it has its fullest packs cut in two: no sample is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.streaming_data.config import Config, ConfigError
from unitoken.streaming_data.files import AsideFolder, locked
from unitoken.streaming_data.packing import pack, split_packs
from unitoken.streaming_data.report import Report, StreamShare

VERSION = 1  # of the algorithm: another one makes other plans, so it is part of the hash
SHUFFLE_BLOCK = 1 << 18  # upstream's default: how far py1e spreads a shard's samples

Ids = npt.NDArray[np.int64]


class StreamRecipe(Config):
    dataset: str  # fingerprint of the samples
    samples: int
    weight: dict[str, float]  # proportion, repeat or choose


class Recipe(Config):
    """Every setting that decides the plan, and the hash of them all. Kept in checkpoints."""

    version: int = VERSION
    seed: int
    packed_length: int
    global_batch: int
    canonical_nodes: int
    window: int
    shuffle: bool
    epoch_size: int | None
    continuous: str  # which images bring features
    features: int  # how many
    streams: dict[str, StreamRecipe]

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump()).encode()).hexdigest()[:16]

    def differences(self, other: dict[str, Any]) -> str:
        """What is different in `other`, a recipe as a checkpoint keeps it: `seed: 0, now 1; ...`."""
        now, then = _flat(self.model_dump()), _flat(other)
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        found = [f"{key}: {then.get(key, 'nothing')}, now {now.get(key, 'nothing')}" for key in keys]
        return "; ".join(found) or "the order of the streams"


@dataclasses.dataclass(frozen=True, eq=False)
class StreamSamples:
    """What the plan needs to know of a dataset: one row a sample, in index order."""

    name: str
    shard_sizes: Ids  # samples a shard
    lengths: npt.NDArray[np.uint32]  # tokens in a pack, continuous features included
    target_tokens: npt.NDArray[np.uint32]
    weight: dict[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An epoch. Pack p holds the samples `ids[offsets[p]:offsets[p + 1]]`, numbered through all streams."""

    ids: npt.NDArray[np.uint32]
    offsets: Ids  # (packs + 1,)
    report: Report

    @property
    def packs(self) -> int:
        return len(self.offsets) - 1

    def pack(self, number: int) -> npt.NDArray[np.uint32]:
        return self.ids[self.offsets[number] : self.offsets[number + 1]]


def partition(
    packs: int, seen: int, *, nodes: int, ranks_per_node: int, rank: int, batch_packs: int, worker: int = 0, workers: int = 1
) -> Ids:
    """The packs that one worker of one rank reads, in its order, after `seen` packs of the epoch.

    Within a rank, worker w of W reads the batches w, w + W, ...: the order in which a DataLoader asks its workers. Neighbouring
    packs go to different nodes, so that with as many canonical rows as nodes each node reads its own shards.
    """
    ranks = nodes * ranks_per_node
    assert not seen % (ranks * batch_packs), "checked where the state is loaded"
    assert not packs % (ranks * batch_packs), "so the plan is made"
    node, rank_of_node = divmod(rank, ranks_per_node)
    turns = np.arange((packs - seen) // ranks, dtype=np.int64)  # this rank's k-th pack
    numbers = seen + (turns * ranks_per_node + rank_of_node) * nodes + node
    return numbers.reshape(-1, batch_packs)[worker::workers].reshape(-1)


def build(recipe: Recipe, streams: Sequence[StreamSamples], epoch: int, packs: int | None) -> Plan:
    """Make the plan of an epoch. `packs` is epoch 0's number of them; None for epoch 0 itself. Raises ConfigError."""
    lengths = np.concatenate([stream.lengths for stream in streams])  # (samples of all streams,)
    order = _order(recipe, streams, epoch)  # (chosen,) sample ids
    nodes, group = recipe.canonical_nodes, math.lcm(recipe.global_batch, recipe.canonical_nodes)
    if len(order) < nodes:
        raise ConfigError(f"{len(order)} samples an epoch do not make canonical_nodes: {nodes} rows")

    rows: list[tuple[Ids, Ids]] = []
    for row in range(nodes):
        ids = order[len(order) * row // nodes : len(order) * (row + 1) // nodes]
        rows.append(_pack_row(ids, lengths, recipe, epoch, row))
    found = sum(len(sizes) for _, sizes in rows)
    packs = packs or found // group * group
    if packs == 0:
        raise ConfigError(
            f"{len(order)} samples of {int(lengths[order].sum())} tokens make {found} packs of packed_length: "
            f"{recipe.packed_length}; an epoch needs at least {group}, the least common multiple of global_batch: "
            f"{recipe.global_batch} and canonical_nodes: {nodes}"
        )
    kept: list[tuple[Ids, Ids]] = []
    dropped = split = 0
    for ids, sizes in rows:
        more = packs // nodes - len(sizes)
        split, dropped = split + max(more, 0), dropped + max(-more, 0)
        sizes = split_packs(sizes, max(more, 0))[: packs // nodes]
        kept.append((ids[: sizes.sum()], sizes))
    ids, sizes = _interleave(kept)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    fill = float(lengths[ids].sum(dtype=np.int64)) / (packs * recipe.packed_length)
    order_hash = hashlib.sha256(ids.astype("<u4").tobytes() + offsets.astype("<i8").tobytes()).hexdigest()[:16]
    report = Report(
        recipe=recipe.hash,
        order=order_hash,
        epoch=epoch,
        packs=packs,
        dropped_packs=dropped,
        dropped_samples=len(order) - len(ids),
        split_packs=split,
        fill=fill,
        streams=_shares(recipe, streams, ids),
    )
    return Plan(ids.astype(np.uint32), offsets, report)


def load_or_build(folder: Path, recipe: Recipe, epoch: int, streams: Callable[[], Sequence[StreamSamples]]) -> Plan:
    """The plan of an epoch, memory-mapped from `folder`; made there first, by one process, where it is missing.

    `streams` is asked for the lengths only where the plan has to be made.
    """
    packs = load_or_build(folder, recipe, 0, streams).packs if epoch else None
    place = folder / recipe.hash / f"epoch-{epoch:06d}"
    if not place.exists():
        with locked(folder / recipe.hash / "lock"):
            if not place.exists():
                _save(build(recipe, streams(), epoch, packs), place)
    report = Report.model_validate_json((place / "report.json").read_bytes())
    return Plan(np.load(place / "ids.npy", mmap_mode="r"), np.load(place / "offsets.npy", mmap_mode="r"), report)


def _save(plan: Plan, place: Path) -> None:
    with AsideFolder(place) as folder:
        np.save(folder.path / "ids.npy", plan.ids)
        np.save(folder.path / "offsets.npy", plan.offsets)
        (folder.path / "report.json").write_text(plan.report.model_dump_json(indent=1))
        folder.publish()


def _order(recipe: Recipe, streams: Sequence[StreamSamples], epoch: int) -> Ids:
    """Choose and shuffle as upstream does: (chosen,) sample ids. What is longer than a pack is no candidate."""
    from streaming import StreamingDataset
    from streaming.base.shuffle import get_shuffle
    from streaming.base.stream import Stream

    candidates, shard_sizes, shards_per_stream, total = [], [], [], 0
    for stream in streams:
        fits = stream.lengths <= recipe.packed_length
        if not len(fits):
            raise ConfigError(f"stream '{stream.name}' holds no samples")
        if not fits.any():
            raise ConfigError(
                f"stream '{stream.name}': each of its {len(fits)} samples is longer than packed_length: {recipe.packed_length} "
                f"(the shortest has {int(stream.lengths.min())} tokens)"
            )
        shard_of = np.repeat(np.arange(len(stream.shard_sizes)), stream.shard_sizes)[fits]
        sizes = np.bincount(shard_of)
        candidates.append(np.flatnonzero(fits) + total)
        shard_sizes.append(sizes[sizes > 0])
        shards_per_stream.append(len(shard_sizes[-1]))
        total += len(fits)
    if total >= 1 << 32:
        raise ConfigError(f"{total} samples in all streams; plans hold sample numbers of 32 bits")

    samples_per_shard = np.concatenate(shard_sizes)
    samples_per_stream = np.array([len(c) for c in candidates], np.int64)
    weights: Any = [types.SimpleNamespace(**stream.weight) for stream in streams]  # upstream asks for these attributes alone
    with np.errstate(invalid="ignore"):  # upstream divides by the total
        total_chosen = Stream.apply_weights(weights, samples_per_stream, recipe.epoch_size, recipe.seed)
    if not total_chosen:
        raise ConfigError("the streams' weights choose no sample at all")
    view: Any = types.SimpleNamespace(
        streams=weights,
        num_streams=len(streams),
        shards_per_stream=np.array(shards_per_stream, np.int64),
        shard_offset_per_stream=np.cumsum(shards_per_stream) - shards_per_stream,
        samples_per_shard=samples_per_shard,
        sample_offset_per_shard=np.cumsum(samples_per_shard) - samples_per_shard,
        sampling_method="balanced",
        sampling_granularity=1,
        shuffle_seed=recipe.seed,
        epoch_seed_change=recipe.shuffle,
    )
    units, chosen = StreamingDataset.resample_streams(view, epoch)
    if recipe.shuffle:
        if len(chosen) < recipe.canonical_nodes:
            raise ConfigError(f"{len(chosen)} samples an epoch do not make canonical_nodes: {recipe.canonical_nodes} rows")
        block = max(SHUFFLE_BLOCK, 2 * int(samples_per_shard.max()))  # upstream does not mix shards larger than a block
        chosen = chosen[get_shuffle("py1e", units, recipe.canonical_nodes, recipe.seed, epoch, block)]
    result: Ids = np.concatenate(candidates)[chosen]
    return result


def _pack_row(ids: Ids, lengths: npt.NDArray[np.uint32], recipe: Recipe, epoch: int, row: int) -> tuple[Ids, Ids]:
    """Pack one canonical row, window by window: its ids pack after pack, and the packs' sizes."""
    windows = max(1, round(len(ids) / recipe.window))  # of equal size: a short last one would pack badly
    all_ids, all_sizes = [], []
    for window in range(windows):
        some = ids[len(ids) * window // windows : len(ids) * (window + 1) // windows]
        order, sizes = pack(lengths[some], recipe.packed_length)
        packed = some[order]
        if recipe.shuffle:
            permutation = np.random.default_rng([recipe.seed, epoch, row, window]).permutation(len(sizes))
        else:  # packs in the order of their first sample
            permutation = np.argsort(order[np.cumsum(sizes) - sizes], kind="stable")
        packed, sizes = _reorder(packed, sizes, permutation)
        all_ids.append(packed)
        all_sizes.append(sizes)
    return np.concatenate(all_ids), np.concatenate(all_sizes)


def _reorder(ids: Ids, sizes: Ids, permutation: Ids) -> tuple[Ids, Ids]:
    """The packs in another order."""
    starts, new_sizes = (np.cumsum(sizes) - sizes)[permutation], sizes[permutation]
    shift = np.repeat(starts - (np.cumsum(new_sizes) - new_sizes), new_sizes)
    return ids[np.arange(len(ids)) + shift], new_sizes


def _interleave(rows: list[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    """Deal the packs of the rows (equally many each) in turn: pack 0 of each row, pack 1 of each row, ..."""
    ids, sizes = np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])
    if len(rows) == 1:
        return ids, sizes
    return _reorder(ids, sizes, np.arange(len(sizes)).reshape(len(rows), -1).T.reshape(-1))


def _shares(recipe: Recipe, streams: Sequence[StreamSamples], ids: Ids) -> tuple[StreamShare, ...]:
    shares, begin = [], 0
    for stream in streams:
        mine = ids[(ids >= begin) & (ids < begin + len(stream.lengths))] - begin
        begin += len(stream.lengths)
        shares.append(
            StreamShare(
                name=stream.name,
                over_long=int((stream.lengths > recipe.packed_length).sum()),
                samples=len(mine),
                tokens=int(stream.lengths[mine].sum(dtype=np.int64)),
                target_tokens=int(stream.target_tokens[mine].sum(dtype=np.int64)),
            )
        )
    return tuple(shares)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

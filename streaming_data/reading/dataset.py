"""Packs as the samples of a `StreamingDataset`.

This keeps the interface of upstream's dataset (streams, `dataset[i]`, `state_dict`, what Composer needs) and
replaces its machinery: the order comes from the plan, the bytes from `shards`. There is no shared memory with
fixed names, no barrier between processes and no background thread that could end unseen: each worker computes
its own share, and the DataLoader raises what goes wrong in it. So upstream's `__init__`, which sets that
machinery up, is not run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
import torch
from pydantic import NonNegativeInt
from streaming import StreamingDataset
from torch import distributed
from torch.utils.data import get_worker_info

from unitoken.common.config import Config, first_problem
from unitoken.common.errors import ConfigError
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.plan.lengths import StreamSamples, read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.reading.null_prompts import drop_captions
from unitoken.streaming_data.reading.shards import Shard, Shards
from unitoken.streaming_data.reading.share import WorkerShare
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, to_streams

STATE_VERSION: Literal[1] = 1

# Packs that a worker reads together, because some work can be done once for many samples.
LOCAL_GROUP, REMOTE_GROUP = 256, 16
GROUPS_AHEAD = 4  # of a remote dataset, whose shards are downloaded while earlier groups are read
DOWNLOADS = 4  # at a time, in each worker


class State(Config):
    """The position of training in the data, as checkpoints keep it."""

    version: Literal[1]  # STATE_VERSION
    plan: str  # hash of the recipe
    order: str | None  # hash of the epoch's order; None if nothing of the epoch was seen
    epoch: NonNegativeInt
    packs: NonNegativeInt  # of the epoch, trained on
    recipe: dict[str, Any]


def in_groups(batches: Iterable[Integers], size: int) -> Iterator[Integers]:
    """Yield the packs of all batches, one after the other, `size` at a time."""
    waiting: list[int] = []
    for batch in batches:
        waiting += batch.tolist()
        while len(waiting) >= size:
            yield np.array(waiting[:size])
            del waiting[:size]
    if waiting:
        yield np.array(waiting)


class PackGroup:
    """Some packs that are read together: the shards of their samples are looked up once for all of them."""

    def __init__(self, dataset: PackedDataset, ids: Integers, ends: list[int]) -> None:
        """Prepare to read the samples `ids` (n,), of which a pack ends at each of `ends`."""
        self._dataset, self._ends = dataset, ends
        shards, places = dataset.locate(ids)
        needed, counts = np.unique(shards, return_counts=True)
        by_shard = places[np.argsort(shards, kind="stable")]
        self._shards: list[int] = shards.tolist()
        self._needed: list[int] = needed.tolist()
        self._places = np.split(by_shard, np.cumsum(counts)[:-1])  # in each of the needed shards
        self._opened: list[Future[tuple[int, Shard]]] | None = None

    def start_opening(self, pool: ThreadPoolExecutor) -> None:
        """Open the shards in threads of `pool`."""
        self._opened = [pool.submit(self._dataset.open_shard, shard) for shard in self._needed]

    def packs(self) -> Iterator[list[Record]]:
        """Yield the packs. A record is decoded when its pack is read."""
        # Each reader yields the samples of a shard in the order in which the packs contain them.
        readers: dict[int, Iterator[Record]] = {}
        for number, shard in enumerate(self._needed):
            if self._opened is None:
                stream, opened = self._dataset.open_shard(shard)
            else:
                stream, opened = self._opened[number].result()
            readers[shard] = opened.records(self._places[number], stream)
        begin = 0
        for end in self._ends:
            yield [next(readers[shard]) for shard in self._shards[begin:end]]
            begin = end


class PackedDataset(StreamingDataset):  # type: ignore[misc]
    """Iterates over this worker's packs, each a list of records. Indexing reads single samples."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[StreamSource],
        *,
        views: Views | None,
        batch_packs: int,
    ) -> None:
        """Load or make the plan of the first epoch, and open the datasets.

        Args:
            config: the `data:` part of a stage.
            sources: the datasets of `config`, opened.
            views: how the vision tower sees an image; None without a vision tower.
            batch_packs: packs in this rank's batch.

        Raises:
            ConfigError: the batch does not fit the world, there is no plan, or a local shard is missing.
        """
        self.nodes, self.ranks_per_node, self.rank = _world()
        ranks = self.nodes * self.ranks_per_node
        if batch_packs * ranks != config.global_batch:
            raise ConfigError(
                f"global_batch: {config.global_batch} packs are not {ranks} ranks x {batch_packs} packs"
            )
        self.sources = list(sources)
        self.streams = to_streams(self.sources)
        self.batch_size, self.replication = batch_packs, None
        self.recipe, self._views = Recipe.of(config, self.sources, views), views
        self._plans = config.cache_folder / "plans"
        self.plan: Plan = self._plan_of(0)
        self.packs_per_epoch = self.plan.packs
        self.length = self.packs_per_epoch // ranks  # len(): packs of this rank

        self._shards = _open_shards(config, self.sources)
        # The first shard of each stream, and the first sample of each shard.
        self._first_shard = np.cumsum([0] + [len(shards.samples) for shards in self._shards])
        self._bounds = np.cumsum(np.concatenate([[0], *(shards.samples for shards in self._shards)]))
        self.num_samples = int(self._bounds[-1])
        self.downloads = DOWNLOADS

        self._next = (0, 0)  # epoch, packs of it already seen
        self._resumed_at = 0  # packs seen when this epoch's iteration began
        # Epoch and packs seen of the iteration in progress, read by workers that live longer than an epoch. A
        # tensor in shared memory has no name, so nothing collides and nothing stays behind.
        self._position = torch.tensor([-1, 0])
        self._position.share_memory_()  # type: ignore[no-untyped-call]
        self.packs_handed_out = 0  # of the epoch in progress, over all ranks; counted by the loader

    def __getstate__(self) -> dict[str, Any]:
        # Pickling would copy the memory-mapped arrays; workers load the plan of their epoch.
        return {**self.__dict__, "plan": None}

    def __del__(self) -> None:
        """Do nothing: upstream's destructor releases its shared memory, and there is none."""

    # --- The position of training

    def start_epoch(self) -> None:
        """Go to the next epoch, or to the position of the loaded state. Called in the rank's own process."""
        epoch, seen = self._next
        if self.plan.report.epoch != epoch:
            self.plan = self._plan_of(epoch)
        self._position[0], self._position[1] = epoch, seen
        self._resumed_at = self.packs_handed_out = seen
        self._next = (epoch + 1, 0)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position of training, as `State` describes it.

        Args:
            num_samples: packs that were trained on, over all ranks.
            from_beginning: counted from the epoch's beginning; otherwise from where the run resumed.
        """
        packs = num_samples if from_beginning else self._resumed_at + num_samples
        epoch = int(self._position[0])
        if epoch < 0:  # not begun
            epoch, packs = self._next
        elif packs == 0 and self.packs_handed_out == self.packs_per_epoch:
            epoch += 1  # Composer's count is back at 0 after an epoch
        order = self._plan_of(epoch).report.order if packs else None
        plan, recipe = self.recipe.hash, self.recipe.model_dump()
        return State(
            version=STATE_VERSION, plan=plan, order=order, epoch=epoch, packs=packs, recipe=recipe
        ).model_dump()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue from the position in a checkpoint.

        Args:
            obj: a `State`, as `state_dict` returned it.

        Raises:
            ConfigError: it is no such state, or that of another plan; the message names what differs.
        """
        try:
            state = State.model_validate(obj)
        except pydantic.ValidationError as error:
            raise ConfigError(
                f"the checkpoint holds no data state of version {STATE_VERSION}: {first_problem(error)}"
            ) from None
        if state.plan == self.recipe.of_version_2().hash and self.recipe.batching_method != "per_stream":
            self.recipe = self.recipe.of_version_2()  # the run began before batches were stratified
            self.plan = self._plan_of(0)
        where = (
            f"the checkpoint was made in epoch {state.epoch} after {state.packs} packs "
            f"of data plan {state.plan}"
        )
        if state.plan != self.recipe.hash:
            raise ConfigError(
                f"{where}; this run's plan is {self.recipe.hash}: {self.recipe.differences(state.recipe)}"
            )
        order = self._plan_of(state.epoch).report.order if state.packs else None
        if state.order != order:
            raise ConfigError(
                f"{where} with order {state.order}, here it is {order}: "
                "it was made by another version of this code"
            )
        if state.packs % self.recipe.global_batch or not 0 <= state.packs <= self.packs_per_epoch:
            raise ConfigError(
                f"{where}; expected a multiple of {self.recipe.global_batch} up to {self.packs_per_epoch}"
            )
        self._next = (state.epoch, state.packs)
        self._position[0] = -1

    # --- Reading

    def __iter__(self) -> Iterator[list[Record]]:
        """Yield this worker's packs of the epoch, from the position of training on."""
        info = get_worker_info()
        if info is None:
            self.start_epoch()
        epoch, seen = self._position.tolist()
        if self.plan is None or self.plan.report.epoch != epoch:
            self.plan = self._plan_of(epoch)
        share = WorkerShare(
            self.plan,
            seen,
            nodes=self.nodes,
            ranks_per_node=self.ranks_per_node,
            rank=self.rank,
            batch_packs=self.batch_size,
            canonical_nodes=self.recipe.canonical_nodes,
            worker=info.id if info else 0,
            workers=info.num_workers if info else 1,
        )
        packs = self._packs(share)
        if self.recipe.null_prompt_fraction and self.recipe.split == "train":  # evaluation keeps all prompts
            return drop_captions(packs, self.recipe.null_prompt_fraction, self.recipe.seed, epoch)
        return packs

    def _packs(self, share: WorkerShare) -> Iterator[list[Record]]:
        """Yield packs; while those of one group are read, threads open the shards of the next groups."""
        if not any(source.store for source in self.sources):
            for group in self._groups(share, LOCAL_GROUP):
                yield from group.packs()
            return
        pool = ThreadPoolExecutor(self.downloads)
        try:
            ahead: deque[PackGroup] = deque()
            for group in self._groups(share, REMOTE_GROUP):
                group.start_opening(pool)
                ahead.append(group)
                if len(ahead) > GROUPS_AHEAD:
                    yield from ahead.popleft().packs()
            for group in ahead:
                yield from group.packs()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _groups(self, share: WorkerShare, size: int) -> Iterator[PackGroup]:
        for packs in in_groups(share, size):
            yield PackGroup(self, *share.plan.samples_of(packs))

    def locate(self, ids: Integers) -> tuple[Integers, Integers]:
        """Return the shards (n,) of samples `ids` (n,), and the samples' places in them (n,).

        Samples and shards are numbered through all streams.
        """
        shards = np.searchsorted(self._bounds, ids, side="right") - 1
        return shards, ids - self._bounds[shards]

    def open_shard(self, shard: int) -> tuple[int, Shard]:
        """Return the stream and the data of a shard, which is numbered through all streams."""
        stream = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return stream, self._shards[stream].open(shard - int(self._first_shard[stream]))

    def get_item(self, sample_id: int) -> Record:
        """Return a sample, numbered through all streams; `dataset[i]` calls this."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        (record,) = next(PackGroup(self, np.array([sample_id]), [1]).packs())
        return record

    # --- The plan

    def _plan_of(self, epoch: int) -> Plan:
        return load_or_build(self._plans, self.recipe, epoch, self._stream_samples)

    def _stream_samples(self) -> list[StreamSamples]:
        return [read_lengths(source, self.recipe, self._views) for source in self.sources]


class _World(NamedTuple):
    nodes: int
    ranks_per_node: int
    rank: int  # of this process


def _world() -> _World:
    """Return the world of torch.distributed, or that of the launcher's environment before initialization."""
    if distributed.is_available() and distributed.is_initialized():
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
    else:
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % ranks_per_node:
        raise ConfigError(f"{ranks} ranks are not whole nodes of {ranks_per_node}")
    return _World(ranks // ranks_per_node, ranks_per_node, rank)


def _open_shards(config: DataConfig, sources: Sequence[StreamSource]) -> list[Shards]:
    """Open each stream's shards, with this host's one record of what was verified and downloaded."""
    stamps, limit = config.cache_folder / "shards", config.cache_limit
    return [
        Shards(source.name, source.folder, source.shards, source.store, stamps, limit) for source in sources
    ]

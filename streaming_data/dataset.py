"""Packs as the samples of a `StreamingDataset`.

Of upstream's dataset this keeps the interface (streams, `dataset[i]`, `state_dict`, what Composer asks for) and replaces the
machinery: the order comes from the plan, the bytes from `shards`. There is no shared memory with fixed names, no barrier
between processes and no background thread that could end unseen: each worker computes its own share, and whatever goes
wrong in it is raised by the DataLoader. So upstream's `__init__`, which sets that machinery up, is not run.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import NonNegativeInt
from streaming import StreamingDataset
from torch import distributed
from torch.utils.data import get_worker_info

from unitoken.streaming_data.config import Config, ConfigError
from unitoken.streaming_data.manifest import SIDECAR
from unitoken.streaming_data.mixture import DataConfig, Source, to_streams
from unitoken.streaming_data.plan import Ids, Plan, Recipe, StreamRecipe, StreamSamples, load_or_build, partition
from unitoken.streaming_data.record import Record
from unitoken.streaming_data.shards import Shards, read_index

STATE_VERSION: Literal[1] = 1
LOOK_AHEAD = 64  # packs whose shards a worker downloads ahead
DOWNLOADS = 4  # at a time, in each worker


class State(Config):
    """Where training is in the data, as checkpoints keep it."""

    version: Literal[1]  # STATE_VERSION
    plan: str  # hash of the recipe
    order: str | None  # hash of the epoch's order; None where nothing was seen of the epoch
    epoch: NonNegativeInt
    packs: NonNegativeInt  # of the epoch, trained on
    recipe: dict[str, Any]


class PackedDataset(StreamingDataset):  # type: ignore[misc]
    """Iterates over this worker's packs, each a list of records. Indexing reads single samples.

    Args:
        features: continuous features an image, F.
        batch_packs: packs in this rank's batch.
        compat: all images bring features, as in the reference.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source], *, features: int, batch_packs: int, compat: bool) -> None:
        self.nodes, self.ranks_per_node, self.rank = _world()
        ranks = self.nodes * self.ranks_per_node
        if batch_packs * ranks != config.global_batch:
            raise ConfigError(f"global_batch: {config.global_batch} packs are not {ranks} ranks x {batch_packs} packs")
        continuous = "all" if compat and config.continuous != "none" else config.continuous
        self.sources = list(sources)
        self.streams = to_streams(self.sources)
        self.batch_size, self.replication = batch_packs, None
        self.recipe = Recipe(
            seed=config.seed,
            packed_length=config.packed_length,
            global_batch=config.global_batch,
            canonical_nodes=config.canonical_nodes,
            window=config.window,
            shuffle=config.shuffle,
            epoch_size=config.epoch_size,
            continuous=continuous,
            features=0 if continuous == "none" else features,
            streams={s.name: StreamRecipe(dataset=s.fingerprint, samples=s.manifest.samples, weight=s.weight) for s in sources},
        )
        self._plans = config.cache_folder / "plans"
        self.plan: Plan = self._plan_of(0)
        self.packs_per_epoch = self.plan.packs
        self.length = self.packs_per_epoch // ranks  # len(): packs of this rank

        self._shards = [Shards(source.folder, source.remote, config.cache_folder) for source in self.sources]
        self._first_shard = np.cumsum([0] + [len(shards.samples) for shards in self._shards])  # of each stream
        self._bounds = np.cumsum(np.concatenate([[0], *(shards.samples for shards in self._shards)]))  # first sample of each shard
        self.num_samples = int(self._bounds[-1])

        self._next = (0, 0)  # epoch, packs of it already seen
        self._resumed_at = 0  # packs seen when this epoch's iteration began
        # Epoch and packs seen of the iteration in progress: workers that live longer than an epoch read it here. A tensor in
        # shared memory has no name, so nothing collides and nothing stays behind.
        self._position = torch.tensor([-1, 0])
        self._position.share_memory_()  # type: ignore[no-untyped-call]
        self.packs_handed_out = 0  # of the epoch in progress, over all ranks; counted by the loader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": None}  # pickling would copy what is memory-mapped; workers load their epoch's

    def __del__(self) -> None:
        """Nothing to release: upstream's destructor is for its shared memory."""

    # Where we are -----------------------------------------------------------------------------------------------------

    def start_epoch(self) -> None:
        """Move on to the next epoch, or to where the loaded state points. Called in the rank's own process."""
        epoch, seen = self._next
        if self.plan.report.epoch != epoch:
            self.plan = self._plan_of(epoch)
        self._position[0], self._position[1] = epoch, seen
        self._resumed_at = self.packs_handed_out = seen
        self._next = (epoch + 1, 0)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where training is, after `num_samples` packs of the epoch (or since it was resumed) have been trained on."""
        packs = num_samples if from_beginning else self._resumed_at + num_samples
        epoch = int(self._position[0])
        if epoch < 0:  # not begun
            epoch, packs = self._next
        elif packs == 0 and self.packs_handed_out == self.packs_per_epoch:  # Composer's count is back at 0 after an epoch
            epoch += 1
        order = self._plan_of(epoch).report.order if packs else None
        plan, recipe = self.recipe.hash, self.recipe.model_dump()
        return State(version=STATE_VERSION, plan=plan, order=order, epoch=epoch, packs=packs, recipe=recipe).model_dump()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue there. Raises ConfigError for the state of another plan, naming what differs."""
        try:
            state = State.model_validate(obj)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"the checkpoint holds no data state of version {STATE_VERSION}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None
        where = f"the checkpoint was made in epoch {state.epoch} after {state.packs} packs of data plan {state.plan}"
        if state.plan != self.recipe.hash:
            raise ConfigError(f"{where}; this run's plan is {self.recipe.hash}: {self.recipe.differences(state.recipe)}")
        order = self._plan_of(state.epoch).report.order if state.packs else None
        if state.order != order:
            raise ConfigError(f"{where} with order {state.order}, here it is {order}: numpy or streaming have another version")
        if state.packs % self.recipe.global_batch or not 0 <= state.packs <= self.packs_per_epoch:
            raise ConfigError(f"{where}; expected a multiple of {self.recipe.global_batch} up to {self.packs_per_epoch}")
        self._next = (state.epoch, state.packs)
        self._position[0] = -1

    # What is read -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[Record]]:
        info = get_worker_info()
        if info is None:
            self.start_epoch()
        epoch, seen = self._position.tolist()
        if self.plan is None or self.plan.report.epoch != epoch:
            self.plan = self._plan_of(epoch)
        work = partition(
            self.packs_per_epoch,
            seen,
            nodes=self.nodes,
            ranks_per_node=self.ranks_per_node,
            rank=self.rank,
            batch_packs=self.batch_size,
            worker=info.id if info else 0,
            workers=info.num_workers if info else 1,
        )
        return self._packs(self.plan, work)

    def _packs(self, plan: Plan, work: Ids) -> Iterator[list[Record]]:
        if not any(source.remote for source in self.sources):
            for number in work:
                yield self._records(plan.pack(number))
            return
        pool = ThreadPoolExecutor(DOWNLOADS)
        downloads: dict[int, Future[Path]] = {}  # by shard
        ahead: deque[list[Future[Path]]] = deque()
        try:
            for position, number in enumerate(work):
                for later in work[position + len(ahead) : position + LOOK_AHEAD]:
                    shards = np.unique(self._shard_of(plan.pack(later))).tolist()
                    ahead.append([downloads.get(s) or downloads.setdefault(s, pool.submit(self._prepare, s)) for s in shards])
                for download in ahead.popleft():
                    download.result()
                yield self._records(plan.pack(number))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _records(self, ids: Any) -> list[Record]:
        ids = np.asarray(ids, np.int64)
        shards = self._shard_of(ids)
        streams = np.searchsorted(self._first_shard, shards, side="right") - 1
        inside = ids - self._bounds[shards]
        shards = shards - self._first_shard[streams]
        return [
            Record.from_mds(self._shards[stream].sample(shard, index))
            for stream, shard, index in zip(streams.tolist(), shards.tolist(), inside.tolist(), strict=True)
        ]

    def _shard_of(self, ids: Any) -> Ids:
        result: Ids = np.searchsorted(self._bounds, np.asarray(ids, np.int64), side="right") - 1
        return result

    def _prepare(self, shard: int) -> Path:
        stream = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return self._shards[stream].prepare(shard - int(self._first_shard[stream]))

    def get_item(self, sample_id: int) -> Record:
        """Sample `sample_id`, numbered through all streams. What `dataset[i]` calls."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        return self._records([sample_id])[0]

    # The plan ---------------------------------------------------------------------------------------------------------

    def _plan_of(self, epoch: int) -> Plan:
        return load_or_build(self._plans, self.recipe, epoch, self._stream_samples)

    def _stream_samples(self) -> list[StreamSamples]:
        return [read_lengths(source, self.recipe.continuous, self.recipe.features) for source in self.sources]


def read_lengths(source: Source, continuous: str, features: int) -> StreamSamples:
    """Lengths of a dataset's samples in a pack, from its sidecar. Raises ConfigError where the files do not fit each other."""
    import pyarrow.parquet

    path = source.folder / SIDECAR
    source.check(SIDECAR)
    counted = {"questions": "question_images", "all": "images"}.get(continuous)
    table = pyarrow.parquet.read_table(path, columns=["tokens", "target_tokens", *([counted] if counted else [])])
    lengths = table["tokens"].to_numpy().astype(np.uint32)
    if counted:
        lengths += table[counted].to_numpy().astype(np.uint32) * np.uint32(1 + features)
    shard_sizes = np.array([entry["samples"] for entry in read_index(source.folder)], np.int64)
    if shard_sizes.sum() != len(lengths):
        raise ConfigError(f"{path}: {len(lengths)} samples, the shards of the index hold {shard_sizes.sum()}")
    return StreamSamples(source.name, shard_sizes, lengths, table["target_tokens"].to_numpy(), source.weight)


def _world() -> tuple[int, int, int]:
    """Nodes, ranks a node, this rank: of torch.distributed where it is initialised, else as the launcher's environment says."""
    if distributed.is_available() and distributed.is_initialized():
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
    else:
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % ranks_per_node:
        raise ConfigError(f"{ranks} ranks are not whole nodes of {ranks_per_node}")
    return ranks // ranks_per_node, ranks_per_node, rank

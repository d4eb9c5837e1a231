"""Packs as the samples of a `StreamingDataset`.

Of upstream's dataset this keeps the interface (streams, `dataset[i]`, `state_dict`, what Composer asks for) and replaces the
machinery: the order comes from the plan, the bytes from `shards`. There is no shared memory with fixed names, no barrier
between processes and no background thread that could end unseen: each worker computes its own share, and whatever goes
wrong in it is raised by the DataLoader. So upstream's `__init__`, which sets that machinery up, is not run.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

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
from unitoken.streaming_data.plan.build import Ids, Plan
from unitoken.streaming_data.plan.lengths import StreamSamples, read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.reading.null_prompts import drop_captions
from unitoken.streaming_data.reading.shards import Shard, Shards
from unitoken.streaming_data.reading.share import WorkerShare
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, to_streams

STATE_VERSION: Literal[1] = 1
LOCAL_RUN, REMOTE_RUN = (
    256,
    16,
)  # packs that a worker reads together: what can be done once for many samples is
RUNS_AHEAD = 4  # of a remote dataset: their shards are downloaded meanwhile
DOWNLOADS = 4  # at a time, in each worker


class State(Config):
    """Where training is in the data, as checkpoints keep it."""

    version: Literal[1]  # STATE_VERSION
    plan: str  # hash of the recipe
    order: str | None  # hash of the epoch's order; None where nothing was seen of the epoch
    epoch: NonNegativeInt
    packs: NonNegativeInt  # of the epoch, trained on
    recipe: dict[str, Any]


class Run:
    """Some packs that are read together: where their samples lie is looked up once for all of them."""

    def __init__(self, dataset: PackedDataset, ids: Ids, ends: list[int]) -> None:
        """Read the samples `ids` (n,), of which a pack ends at each of `ends`."""
        self._dataset, self._ends = dataset, ends
        self._shards, self._places = dataset.locate(ids)
        self._needed: list[int] = np.unique(self._shards).tolist()
        self._opened: list[Future[tuple[int, Shard]]] | None = None

    def open(self, pool: ThreadPoolExecutor) -> None:
        """Begin to open the shards."""
        self._opened = [pool.submit(self._dataset.open_shard, shard) for shard in self._needed]

    def packs(self) -> Iterator[list[Record]]:
        opened = (
            map(self._dataset.open_shard, self._needed)
            if self._opened is None
            else (f.result() for f in self._opened)
        )
        order = np.argsort(self._shards, kind="stable")
        bounds = np.searchsorted(self._shards[order], [*self._needed, self._needed[-1] + 1]).tolist()
        of_shard: dict[int, Iterator[Record]] = {}  # in the order in which the packs ask for them
        for shard, (stream, data), first, last in zip(self._needed, opened, bounds, bounds[1:], strict=False):
            of_shard[shard] = data.records(self._places[order[first:last]], stream)
        records = [of_shard[shard] for shard in self._shards.tolist()]
        for begin, end in zip([0, *self._ends], self._ends, strict=False):
            yield list(map(next, records[begin:end]))


class PackedDataset(StreamingDataset):  # type: ignore[misc]
    """Iterates over this worker's packs, each a list of records. Indexing reads single samples.

    Args:
        views: how the vision tower sees an image; None where there is none.
        batch_packs: packs in this rank's batch.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[StreamSource],
        *,
        views: Views | None,
        batch_packs: int,
    ) -> None:
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

        stamps = config.cache_folder / "shards"
        self._shards = [Shards(s.name, s.folder, s.store, stamps, config.cache_limit) for s in self.sources]
        self._first_shard = np.cumsum(
            [0] + [len(shards.samples) for shards in self._shards]
        )  # of each stream
        self._bounds = np.cumsum(
            np.concatenate([[0], *(shards.samples for shards in self._shards)])
        )  # first sample of each shard
        self.num_samples = int(self._bounds[-1])

        self._next = (0, 0)  # epoch, packs of it already seen
        self._resumed_at = 0  # packs seen when this epoch's iteration began
        # Epoch and packs seen of the iteration in progress: workers that live longer than an epoch read it here. A tensor in
        # shared memory has no name, so nothing collides and nothing stays behind.
        self._position = torch.tensor([-1, 0])
        self._position.share_memory_()  # type: ignore[no-untyped-call]
        self.packs_handed_out = 0  # of the epoch in progress, over all ranks; counted by the loader

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "plan": None,
        }  # pickling would copy what is memory-mapped; workers load their epoch's

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
        elif (
            packs == 0 and self.packs_handed_out == self.packs_per_epoch
        ):  # Composer's count is back at 0 after an epoch
            epoch += 1
        order = self._plan_of(epoch).report.order if packs else None
        plan, recipe = self.recipe.hash, self.recipe.model_dump()
        return State(
            version=STATE_VERSION, plan=plan, order=order, epoch=epoch, packs=packs, recipe=recipe
        ).model_dump()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue there. Raises ConfigError for the state of another plan, naming what differs."""
        try:
            state = State.model_validate(obj)
        except pydantic.ValidationError as error:
            raise ConfigError(
                f"the checkpoint holds no data state of version {STATE_VERSION}: {first_problem(error)}"
            ) from None
        if state.plan == self.recipe.of_version_2().hash and self.recipe.batching_method != "per_stream":
            self.recipe = self.recipe.of_version_2()  # it was begun before batches were stratified
            self.plan = self._plan_of(0)
        where = f"the checkpoint was made in epoch {state.epoch} after {state.packs} packs of data plan {state.plan}"
        if state.plan != self.recipe.hash:
            raise ConfigError(
                f"{where}; this run's plan is {self.recipe.hash}: {self.recipe.differences(state.recipe)}"
            )
        order = self._plan_of(state.epoch).report.order if state.packs else None
        if state.order != order:
            raise ConfigError(
                f"{where} with order {state.order}, here it is {order}: it was made by another version of this code"
            )
        if state.packs % self.recipe.global_batch or not 0 <= state.packs <= self.packs_per_epoch:
            raise ConfigError(
                f"{where}; expected a multiple of {self.recipe.global_batch} up to {self.packs_per_epoch}"
            )
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
        if (
            self.recipe.null_prompt_fraction and self.recipe.split == "train"
        ):  # what is held out is read as it is
            return drop_captions(packs, self.recipe.null_prompt_fraction, self.recipe.seed, epoch)
        return packs

    def _packs(self, share: WorkerShare) -> Iterator[list[Record]]:
        """While the packs of one run are handed out, threads download and map the shards of the next ones."""
        if not any(source.store for source in self.sources):
            for run in self._runs(share, LOCAL_RUN):
                yield from run.packs()
            return
        pool = ThreadPoolExecutor(DOWNLOADS)
        try:
            ahead: deque[Run] = deque()
            for run in self._runs(share, REMOTE_RUN):
                run.open(pool)
                ahead.append(run)
                if len(ahead) > RUNS_AHEAD:
                    yield from ahead.popleft().packs()
            for run in ahead:
                yield from run.packs()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _runs(self, share: WorkerShare, size: int) -> Iterator[Run]:
        packs = itertools.chain.from_iterable(batch.tolist() for batch in share)
        while some := list(itertools.islice(packs, size)):
            yield Run(self, *share.plan.samples_of(np.array(some)))

    def locate(self, ids: Any) -> tuple[Ids, Ids]:
        """Samples (n,), numbered through all streams -> their shards (n,), also numbered so, and places in the shards (n,)."""
        shards = np.searchsorted(self._bounds, ids, side="right") - 1
        return shards, ids - self._bounds[shards]

    def open_shard(self, shard: int) -> tuple[int, Shard]:
        """A shard, numbered through all streams, and its stream."""
        stream = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return stream, self._shards[stream].open(shard - int(self._first_shard[stream]))

    def get_item(self, sample_id: int) -> Record:
        """Sample `sample_id`, numbered through all streams. What `dataset[i]` calls."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        (record,) = next(Run(self, np.array([sample_id]), [1]).packs())
        return record

    # The plan ---------------------------------------------------------------------------------------------------------

    def _plan_of(self, epoch: int) -> Plan:
        return load_or_build(self._plans, self.recipe, epoch, self._stream_samples)

    def _stream_samples(self) -> list[StreamSamples]:
        return [read_lengths(source, self.recipe, self._views) for source in self.sources]


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

"""Which packs of the plan a worker of a rank reads, in closed form: the global batches are the same on any cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from unitoken.streaming_data.arrays import Integers as Ids
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.reading.balance import balance


@dataclasses.dataclass(frozen=True, eq=False)
class WorkerShare:
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

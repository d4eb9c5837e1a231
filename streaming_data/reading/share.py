"""Which packs a worker of a rank reads, in closed form: the global batches are the same on any cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.reading.balance import balance


def packs_of_node(
    plan: Plan, batch: Integers, node: int, *, nodes: int, ranks_per_node: int, canonical_nodes: int
) -> Integers:
    """Return the packs of a global batch that the ranks of a node train on.

    With as many canonical rows as nodes (or a multiple), each node keeps to its own rows and so to its own
    shards, and the work is balanced among its ranks; otherwise among all ranks.

    Args:
        plan: the epoch's.
        batch: (G,) packs of the global batch.
        node: number of the node.
        nodes: how many there are.
        ranks_per_node: of each.
        canonical_nodes: rows of the plan.

    Returns:
        (ranks_per_node, packs of a rank). Where there is a choice, a rank's packs are ordered from heavy to
            light.
    """
    if canonical_nodes % nodes == 0:
        return _deal(plan, batch[node::nodes], ranks_per_node)
    first = node * ranks_per_node
    return _deal(plan, batch, nodes * ranks_per_node)[first : first + ranks_per_node]


def _deal(plan: Plan, packs: Integers, ranks: int) -> Integers:
    """Return the packs of each rank, (ranks, packs of a rank)."""
    if ranks == 1:
        return packs[None]
    dealt: Integers = packs[balance(plan.squares[packs], plan.images[packs], ranks)]
    return dealt


@dataclasses.dataclass(frozen=True, eq=False)
class WorkerShare:
    """The packs that one worker of one rank reads, in its order, after `seen` packs of the epoch.

    Within a rank, worker w of W reads the batches w, w + W, ...: the order in which a DataLoader asks its
    workers.
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
        assert not self.seen % self.global_batch, "checked when the state is loaded"
        assert not self.plan.packs % self.global_batch, "plans are made so"

    @property
    def global_batch(self) -> int:
        """Packs in a batch over all ranks."""
        return self.nodes * self.ranks_per_node * self.batch_packs

    def __len__(self) -> int:
        """Return the number of this worker's batches."""
        return len(range(self.worker, (self.plan.packs - self.seen) // self.global_batch, self.workers))

    def __iter__(self) -> Iterator[Integers]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Integers:
        """Return the packs of this worker's batch `number`, (batch_packs,)."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin = self.seen + (self.worker + number * self.workers) * self.global_batch
        node, rank_in_node = divmod(self.rank, self.ranks_per_node)
        packs: Integers = packs_of_node(
            self.plan,
            np.arange(begin, begin + self.global_batch),
            node,
            nodes=self.nodes,
            ranks_per_node=self.ranks_per_node,
            canonical_nodes=self.canonical_nodes,
        )[rank_in_node]
        return packs

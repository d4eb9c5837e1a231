"""Simulate the downloads, cache and bandwidth that streaming a mixture needs of each node.

The plan says which packs a node reads and in which order, the index how large shards are. The simulation
replays what `dataset.py` and `shard_cache.py` do with them: each process opens the shards of a group of packs
and keeps some of them mapped, and the node's cache evicts what was opened longest ago. The numbers are
counted, not estimated: they equal what a run with one download at a time really fetches. Only times are an
estimate: downloads share the bandwidth, and every step takes equally long.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.arrays import Floats, Integers
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.reading.dataset import GROUPS_AHEAD, REMOTE_GROUP, in_groups
from unitoken.streaming_data.reading.shards import MOST_MAPPED_LIMITED, Newest
from unitoken.streaming_data.reading.share import packs_of_node
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, open_sources
from unitoken.streaming_data.tables import format_table

SIMULATED_NODES = 4  # of many, which differ by chance alone
_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}

Opening = tuple[int, int]  # step and shard


class Demand(Config):
    """What a node needs for an epoch: of each number, the largest among the simulated nodes."""

    nodes: int
    steps: int
    hours: float  # without any waiting
    samples_bytes: int  # of the samples it reads
    shards: int  # different ones that it needs
    shards_bytes: int
    active: float  # mean number of shards between their first and last use
    most_active: int
    cache_bytes: int  # the least limit with which no shard is downloaded twice
    downloads: int  # with the cache's limit
    downloaded_bytes: int
    most_cached_bytes: int  # at any time
    bytes_an_hour: float
    bandwidth: float  # share of it that is used
    wait: float  # share of the time in which training waits for data, the start included


class Shape(NamedTuple):
    """The shape of the world that reads."""

    nodes: int
    ranks_per_node: int
    workers: int
    global_batch: int
    canonical_nodes: int


class ShardTable(NamedTuple):
    """All streams' shards, numbered one after the other."""

    bounds: Integers  # (shards + 1,) first sample of each
    sizes: Integers  # (shards,) bytes
    streams: Integers  # (shards,) of which stream


def parse_bandwidth(text: str) -> float:
    """Convert `10gbit` to bits a second. Raises ConfigError."""
    match = re.fullmatch(r"([\d.]+) *([kmg])bit", text.strip().lower())
    try:
        value = float(match[1]) * _BITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"bandwidth: expected bits a second as 500mbit or 10gbit, found {text!r}")
    return value


def parse_nodes(text: str) -> list[int]:
    """Convert `1,2,64` to numbers of nodes, ascending. Raises ConfigError."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ConfigError(f"nodes: expected numbers of nodes as 1,2,64, found {text!r}")
    return counts


def demand_table(demands: Sequence[Demand], cache_limit: int | None) -> str:
    """Return the demands as a table for people."""
    head = (
        "nodes  steps  epoch  shards in use (most)  samples read  cache needed  downloads (times)  "
        "an hour  bandwidth  waiting"
    )
    rows = [
        [
            f"{d.nodes:,}",
            f"{d.steps:,}",
            _duration(d.hours),
            f"{d.active:,.0f} ({d.most_active:,})",
            _size(d.samples_bytes),
            _size(d.cache_bytes),
            f"{_size(d.downloaded_bytes)} ({d.downloaded_bytes / max(d.shards_bytes, 1):,.2f})",
            _size(d.bytes_an_hour),
            f"{d.bandwidth:.1%}",
            f"{d.wait:.1%}",
        ]
        for d in demands
    ]
    limit = "an unlimited cache" if cache_limit is None else f"a cache of {_size(cache_limit)}"
    notes = [
        f"For one node and one epoch. Downloads: with {limit}; times: how often each byte is downloaded.",
        "Cache needed: the least with which no shard is downloaded twice. "
        "Bandwidth: above 100 % it slows training down.",
    ]
    return "\n".join([*format_table([head.split("  "), *rows]), *notes])


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _size(count: float) -> str:
    for unit, size in (("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1024:,.1f} KB"


def shard_table(sources: Sequence[StreamSource]) -> ShardTable:
    """Return the shards that the sources' indices list."""
    entries = [(number, entry) for number, source in enumerate(sources) for entry in source.shards]
    return ShardTable(
        np.cumsum([0] + [entry["samples"] for _, entry in entries], dtype=np.int64),
        np.array([entry["raw_data"]["bytes"] for _, entry in entries], np.int64),
        np.array([number for number, _ in entries], np.int64),
    )


def simulate_nodes(
    config: DataConfig,
    counts: Sequence[int],
    ranks_per_node: int,
    view: tuple[int, int],
    bandwidth: float,
    batch_seconds: float | None,
    tokens_per_second: float | None,
) -> tuple[list[Demand], list[int]]:
    """Simulate the first epoch for each number of nodes.

    Args:
        config: the `data:` part of a stage.
        counts: numbers of nodes.
        ranks_per_node: of each.
        view: image and patch size of the vision tower, in pixels.
        bandwidth: of a node, bits a second.
        batch_seconds: that a step takes; or give `tokens_per_second`.
        tokens_per_second: that a node trains on.

    Returns:
        The demands, and the numbers of nodes whose ranks can not share a global batch evenly.
    """
    speed = batch_seconds or tokens_per_second or 0
    if (batch_seconds is None) == (tokens_per_second is None) or speed <= 0:
        raise ConfigError(
            "the speed of training decides how fast data is needed: "
            "give --batch-seconds or --tokens-per-second"
        )
    possible = [nodes for nodes in counts if config.global_batch % (nodes * ranks_per_node) == 0]
    sources, views = open_sources(config), Views(*view, config.anyres)
    recipe = Recipe.of(config, sources, views)
    plan = load_or_build(
        config.cache_folder / "plans",
        recipe,
        0,
        lambda: [read_lengths(source, recipe, views) for source in sources],
    )
    table, steps = shard_table(sources), plan.packs // config.global_batch
    tokens = sum(share.tokens for share in plan.report.streams)
    demands = []
    for nodes in possible:
        workers = max(config.workers, 1)
        shape = Shape(nodes, ranks_per_node, workers, config.global_batch, config.canonical_nodes)
        seconds = tokens / nodes / tokens_per_second if tokens_per_second else steps * (batch_seconds or 0.0)
        limit = config.cache_limit
        demands.append(
            simulate(plan, table, shape, node_seconds=seconds, bandwidth=bandwidth, cache_limit=limit)
        )
    return demands, [nodes for nodes in counts if nodes not in possible]


def simulate(
    plan: Plan,
    table: ShardTable,
    shape: Shape,
    *,
    node_seconds: float,
    bandwidth: float,
    cache_limit: int | None,
) -> Demand:
    """Simulate an epoch.

    Args:
        plan: the epoch's.
        table: the shards.
        shape: of the world.
        node_seconds: that a node computes in the whole epoch.
        bandwidth: of a node, bits a second.
        cache_limit: bytes; None keeps everything.
    """
    simulated = sorted({n * (shape.nodes - 1) // (SIMULATED_NODES - 1) for n in range(SIMULATED_NODES)})
    demands = [
        _simulate_node(plan, table, shape, node, node_seconds, bandwidth, cache_limit) for node in simulated
    ]
    largest = {name: max(getattr(demand, name) for demand in demands) for name in Demand.model_fields}
    return Demand.model_validate(largest)


def _simulate_node(
    plan: Plan,
    table: ShardTable,
    shape: Shape,
    node: int,
    node_seconds: float,
    bandwidth: float,
    cache_limit: int | None,
) -> Demand:
    steps = plan.packs // shape.global_batch
    packs = _packs_of(plan, shape, node)
    reads = _reads(plan, table, packs, shape)
    opens = _opens(reads, table)
    shards = np.array([read.shard for read in reads])
    active = _active(np.array([read.step for read in reads]), shards, steps)
    downloads, most_cached = _downloads(opens, table.sizes, cache_limit)
    sizes = [int(table.sizes[shard]) for _, shard in downloads]
    fetched = np.bincount([step for step, _ in downloads], sizes, minlength=steps)  # (steps,) bytes
    needed = np.unique(shards)
    steps_ahead = GROUPS_AHEAD * REMOTE_GROUP * shape.workers / packs.shape[2]
    return Demand(
        nodes=shape.nodes,
        steps=steps,
        hours=node_seconds / 3600,
        samples_bytes=_samples_bytes(plan, table, packs),
        shards=len(needed),
        shards_bytes=int(table.sizes[needed].sum()),
        active=float(active.mean()),
        most_active=int(active.max()),
        cache_bytes=_cache_needed(opens, table.sizes),
        downloads=len(downloads),
        downloaded_bytes=int(fetched.sum()),
        most_cached_bytes=most_cached,
        bytes_an_hour=float(fetched.sum()) / node_seconds * 3600,
        bandwidth=float(fetched.sum()) * 8 / bandwidth / node_seconds,
        wait=_wait(fetched * 8 / bandwidth, node_seconds / steps, steps_ahead),
    )


def _packs_of(plan: Plan, shape: Shape, node: int) -> Integers:
    """Return the packs of a node's ranks, (steps, ranks_per_node, packs of a rank)."""
    steps = plan.packs // shape.global_batch
    batches = np.arange(steps * shape.global_batch).reshape(steps, shape.global_batch)
    dealt = [
        packs_of_node(
            plan,
            batch,
            node,
            nodes=shape.nodes,
            ranks_per_node=shape.ranks_per_node,
            canonical_nodes=shape.canonical_nodes,
        )
        for batch in batches
    ]
    return np.stack(dealt)


class _Read(NamedTuple):
    """A process of a node needs a shard. They compare by time."""

    step: int
    process: int
    group: int  # of packs that the process reads together
    shard: int


def _reads(plan: Plan, table: ShardTable, packs: Integers, shape: Shape) -> list[_Read]:
    """Return the shards that each process needs for each of its groups of packs, in the order of time."""
    reads = []
    for process in range(shape.ranks_per_node * shape.workers):
        rank, worker = divmod(process, shape.workers)
        groups = in_groups(packs[worker :: shape.workers, rank], REMOTE_GROUP)
        for number, group in enumerate(groups):
            step = worker + number * REMOTE_GROUP // packs.shape[2] * shape.workers
            shards = np.unique(_shards_of(plan, table, group))
            reads += [_Read(step, process, number, shard) for shard in shards.tolist()]
    return sorted(reads)


def _shards_of(plan: Plan, table: ShardTable, packs: Integers) -> Integers:
    """Return the shard of each sample in `packs`."""
    shards: Integers = np.searchsorted(table.bounds, plan.samples_of(packs)[0], side="right") - 1
    return shards


def _samples_bytes(plan: Plan, table: ShardTable, packs: Integers) -> int:
    """Return the bytes of all samples in `packs`, each taken to be of its shard's mean size."""
    counts = np.bincount(_shards_of(plan, table, packs.reshape(-1)), minlength=len(table.sizes))
    return int((counts * table.sizes / np.maximum(np.diff(table.bounds), 1)).sum())


def _opens(reads: Sequence[_Read], table: ShardTable) -> list[Opening]:
    """Return the reads that open a shard: a process keeps some shards mapped (`Shards.open`)."""
    mapped: dict[tuple[int, int], Newest[int, bool]] = {}  # of each process and stream
    opens = []
    streams: list[int] = table.streams.tolist()
    for read in reads:
        shards = mapped.setdefault((read.process, streams[read.shard]), Newest(MOST_MAPPED_LIMITED))
        if shards.get(read.shard) is None:
            shards.add(read.shard, True)
            opens.append((read.step, read.shard))
    return opens


def _active(step: Integers, shard: Integers, steps: int) -> Integers:
    """Return how many shards are between their first and their last use at each step, (steps,)."""
    first = np.unique(shard, return_index=True)[1]  # `shard` is in the order of time
    last = len(shard) - 1 - np.unique(shard[::-1], return_index=True)[1]
    changes = np.zeros(steps + 1, np.int64)
    np.add.at(changes, step[first], 1)
    np.add.at(changes, step[last] + 1, -1)
    return np.cumsum(changes)[:steps]


def _downloads(opens: Sequence[Opening], sizes: Integers, limit: int | None) -> tuple[list[Opening], int]:
    """Return the openings that download, and the most bytes that are cached at a time.

    The rule is that of `Cache`: before a download, evict what was opened longest ago until there is room.
    """
    cached: OrderedDict[int, int] = OrderedDict()  # least recently opened first
    downloads, total, most = [], 0, 0
    for step, shard in opens:
        if shard in cached:
            cached.move_to_end(shard)
            continue
        size = int(sizes[shard])
        while limit is not None and cached and total + size > limit:
            total -= cached.popitem(last=False)[1]
        cached[shard] = size
        total += size
        most = max(most, total)
        downloads.append((step, shard))
    return downloads, most


def _cache_needed(opens: Sequence[Opening], sizes: Integers) -> int:
    """Return the least limit that downloads nothing twice: the largest LRU reuse distance, in bytes."""
    needed = total = 0
    stack: OrderedDict[int, int] = OrderedDict()  # all shards so far, least recently opened first
    top: OrderedDict[int, int] = OrderedDict()  # the end of the stack that fits into `needed` bytes
    for _, shard in opens:
        size = int(sizes[shard])
        if shard not in stack:
            top[shard] = size
            total += size
            needed = max(needed, size)
        elif shard not in top:  # its reuse distance is the largest so far
            top = _end_of(stack, shard)
            total = sum(top.values())
            needed = max(needed, total)
        top.move_to_end(shard)
        stack[shard] = size
        stack.move_to_end(shard)
        while total > needed:
            total -= top.popitem(last=False)[1]
    return needed


def _end_of(stack: OrderedDict[int, int], shard: int) -> OrderedDict[int, int]:
    """Return the end of an LRU stack from `shard` on."""
    newest_first = []
    for other in reversed(stack):
        newest_first.append((other, stack[other]))
        if other == shard:
            break
    return OrderedDict(reversed(newest_first))


def _wait(download_seconds: Floats, step_seconds: float, steps_ahead: float) -> float:
    """Return the share of the epoch's time that is spent waiting for data.

    Args:
        download_seconds: (steps,) of the shards that each step needs first.
        step_seconds: that a step computes.
        steps_ahead: a step's shards are requested this many steps before.
    """
    ahead = max(1, round(steps_ahead))
    begun = [0.0] * len(download_seconds)  # when each step begins
    network_free = step_end = 0.0
    for step, seconds in enumerate(download_seconds.tolist()):
        requested = begun[step - ahead] if step >= ahead else 0.0
        network_free = max(network_free, requested) + seconds
        begun[step] = max(step_end, network_free if seconds else 0.0)
        step_end = begun[step] + step_seconds
    return 1 - len(begun) * step_seconds / step_end

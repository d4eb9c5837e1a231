"""What streaming a mixture asks of each node, on paper: downloads, cache and bandwidth for any number of nodes.

The plan says which packs a node reads and in which order, the index how large shards are; what is played through here is
what `dataset.py` and `cache.py` do with them: each process opens the shards of a run of packs, keeps some of them mapped, and
the node's cache evicts what was opened longest ago. Counted, not estimated: equal to what a run of one download at a time
really fetches. Times alone are an estimate: downloads share the bandwidth, and a step takes as long as it is said to.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.store import load_or_build
from unitoken.streaming_data.reading.balance import balance
from unitoken.streaming_data.reading.dataset import REMOTE_RUN, RUNS_AHEAD
from unitoken.streaming_data.reading.shards import MOST_OPEN_LIMITED
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, open_sources

NODES_LOOKED_AT = 4  # of many: they differ by chance alone
_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}

Ids = npt.NDArray[np.int64]


class Demand(Config):
    """What a node needs for an epoch: of the nodes that were looked at, the one that needs most of it."""

    nodes: int
    steps: int
    hours: float  # without any waiting
    samples_bytes: int  # of the samples it reads
    shards: int  # different ones that it needs
    shards_bytes: int
    active: float  # shards at a time that are begun and not yet done with
    most_active: int
    cache_bytes: int  # with so much no shard is downloaded twice
    downloads: int  # with the cache's limit
    downloaded_bytes: int
    most_cached_bytes: int  # at any time
    bytes_an_hour: float
    bandwidth: float  # share of it that is in use
    wait: float  # share of the time in which training waits for data, the start included


class Shape(NamedTuple):
    """Of the world that reads."""

    nodes: int
    ranks_per_node: int
    workers: int
    global_batch: int
    canonical_nodes: int


class ShardTable(NamedTuple):
    """All streams' shards, numbered one after the other."""

    bounds: Ids  # (shards + 1,) first sample of each
    sizes: Ids  # (shards,) bytes
    streams: Ids  # (shards,) of which stream


def parse_bandwidth(text: str) -> float:
    """`10gbit` -> bits a second. Raises ConfigError."""
    match = re.fullmatch(r"([\d.]+) *([kmg])bit", text.strip().lower())
    try:
        value = float(match[1]) * _BITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"bandwidth: expected bits a second as 500mbit or 10gbit, found {text!r}")
    return value


def demand_table(demands: Sequence[Demand], cache_limit: int | None) -> str:
    """For people."""
    head = "nodes  steps  epoch  shards in use (most)  samples read  cache needed  downloads (times)  an hour  bandwidth  waiting"
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
    cells = [head.split("  "), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    limit = "no limit of the cache" if cache_limit is None else f"a cache of {_size(cache_limit)}"
    lines += [
        f"Of one node, in one epoch. Downloads: with {limit}; times: how often each byte comes.",
        "Cache needed: with so much no shard is downloaded twice. Bandwidth: over 100 % training is slower than it could be.",
    ]
    return "\n".join(lines)


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
    entries = [
        (number, entry) for number, source in enumerate(sources) for entry in read_index(source.folder)
    ]
    return ShardTable(
        np.cumsum([0] + [entry["samples"] for _, entry in entries], dtype=np.int64),
        np.array([entry["raw_data"]["bytes"] for _, entry in entries], np.int64),
        np.array([number for number, _ in entries], np.int64),
    )


def parse_nodes(text: str) -> list[int]:
    """`1,2,64` -> numbers of nodes, ascending. Raises ConfigError."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ConfigError(f"nodes: expected numbers of nodes as 1,2,64, found {text!r}")
    return counts


def simulate_nodes(
    config: DataConfig,
    counts: Sequence[int],
    ranks_per_node: int,
    view: tuple[int, int],
    bandwidth: float,
    batch_seconds: float | None,
    tokens_per_second: float | None,
) -> tuple[list[Demand], list[int]]:
    """The first epoch for each number of nodes, and the numbers of nodes that can not share its batches.

    Args:
        view: image and patch size of the vision tower, in pixels.
        bandwidth: of a node, bits a second.
        batch_seconds, tokens_per_second: of a step, or of a node; one of them.
    """
    if (batch_seconds is None) == (tokens_per_second is None) or (
        batch_seconds or tokens_per_second or 0
    ) <= 0:
        raise ConfigError(
            "how fast training is decides how fast data is needed: give --batch-seconds or --tokens-per-second"
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
    shards, steps = shard_table(sources), plan.packs // config.global_batch
    tokens = sum(share.tokens for share in plan.report.streams)
    demands = []
    for nodes in possible:
        shape = Shape(
            nodes, ranks_per_node, max(config.workers, 1), config.global_batch, config.canonical_nodes
        )
        seconds = tokens / nodes / tokens_per_second if tokens_per_second else steps * (batch_seconds or 0.0)
        limit = config.cache_limit
        demands.append(
            simulate(plan, shards, shape, node_seconds=seconds, bandwidth=bandwidth, cache_limit=limit)
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
    """Play an epoch through.

    Args:
        node_seconds: that a node computes in the whole epoch.
        bandwidth: of a node, bits a second.
        cache_limit: bytes; None keeps everything.
    """
    looked_at = sorted({n * (shape.nodes - 1) // (NODES_LOOKED_AT - 1) for n in range(NODES_LOOKED_AT)})
    steps = plan.packs // shape.global_batch
    demands = []
    for packs in _packs_of(plan, shape, looked_at):  # (steps, ranks_per_node, batch_packs)
        step, process, shard, counts = _needs(plan, table, packs, shape)
        opens = _opens(step, process, shard, table)
        active = _active(step, shard, steps)
        downloads, most_cached = _downloads(opens, table.sizes, cache_limit)
        fetched = np.bincount(
            [at for at, _ in downloads], [int(table.sizes[s]) for _, s in downloads], minlength=steps
        )
        different = np.unique(shard)
        ahead = RUNS_AHEAD * REMOTE_RUN * shape.workers / packs.shape[2]
        demands.append(
            {
                "samples_bytes": int((counts * table.sizes / np.maximum(np.diff(table.bounds), 1)).sum()),
                "shards": len(different),
                "shards_bytes": int(table.sizes[different].sum()),
                "active": float(active.mean()),
                "most_active": int(active.max()),
                "cache_bytes": _cache_needed(opens, table.sizes),
                "downloads": len(downloads),
                "downloaded_bytes": int(fetched.sum()),
                "most_cached_bytes": most_cached,
                "bytes_an_hour": float(fetched.sum()) / node_seconds * 3600,
                "bandwidth": float(fetched.sum()) * 8 / bandwidth / node_seconds,
                "wait": _wait(fetched * 8 / bandwidth, node_seconds / steps, ahead),
            }
        )
    worst: dict[str, Any] = {key: max(demand[key] for demand in demands) for key in demands[0]}
    return Demand(nodes=shape.nodes, steps=steps, hours=node_seconds / 3600, **worst)


def _packs_of(plan: Plan, shape: Shape, nodes: Sequence[int]) -> list[Ids]:
    """The packs of some nodes, (steps, ranks_per_node, batch_packs) each: what `Share` gives their ranks."""
    batches = np.arange(plan.packs // shape.global_batch * shape.global_batch).reshape(-1, shape.global_batch)
    ranks = shape.ranks_per_node
    if shape.canonical_nodes % shape.nodes == 0:
        return [
            np.stack([_deal(plan, batch[node :: shape.nodes], ranks) for batch in batches]) for node in nodes
        ]
    mine = np.concatenate([np.arange(node * ranks, (node + 1) * ranks) for node in nodes])
    dealt = np.stack([_deal(plan, batch, shape.nodes * ranks)[mine] for batch in batches])
    return [dealt[:, n * ranks : (n + 1) * ranks] for n in range(len(nodes))]


def _deal(plan: Plan, packs: Ids, ranks: int) -> Ids:
    """(ranks, each)"""
    if ranks == 1:
        return packs[None]
    dealt: Ids = packs[balance(plan.squares[packs], plan.images[packs], ranks)]
    return dealt


def _needs(plan: Plan, table: ShardTable, packs: Ids, shape: Shape) -> tuple[Ids, Ids, Ids, Ids]:
    """Which shards each process needs for each of its runs, in the order of time.

    Returns:
        step, process, shard: (n,) each; and how many samples are read of each shard (shards,).
    """
    offsets = np.asarray(plan.offsets).astype(np.int64)
    columns, counts = [], np.zeros(len(table.sizes), np.int64)
    for process in range(shape.ranks_per_node * shape.workers):
        rank, worker = divmod(process, shape.workers)
        mine = packs[worker :: shape.workers, rank].reshape(-1)
        sizes = offsets[mine + 1] - offsets[mine]
        run_of = np.repeat(np.arange(len(mine)) // REMOTE_RUN, sizes)
        places = np.arange(sizes.sum()) + np.repeat(offsets[mine] - (np.cumsum(sizes) - sizes), sizes)
        shards = np.searchsorted(table.bounds, plan.ids[places], side="right") - 1
        counts += np.bincount(shards, minlength=len(counts))
        run, shard = np.divmod(np.unique(run_of * len(counts) + shards), len(counts))
        step = worker + run * REMOTE_RUN // packs.shape[2] * shape.workers
        columns.append(np.stack([step, np.full(len(run), process), run, shard]))
    step, process_of, run, shard = np.concatenate(columns, axis=1)
    order = np.lexsort((shard, run, process_of, step))
    return step[order], process_of[order], shard[order], counts


def _opens(step: Ids, process: Ids, shard: Ids, table: ShardTable) -> list[tuple[int, int]]:
    """(step, shard) of what is really opened: a process keeps the last ones of each stream mapped (`Shards.open`)."""
    mapped: dict[tuple[int, int], dict[int, None]] = {}
    opens = []
    stream = table.streams[shard]
    for at, who, what, where in zip(
        step.tolist(), process.tolist(), shard.tolist(), stream.tolist(), strict=True
    ):
        mine = mapped.setdefault((who, where), {})
        if what not in mine:
            if len(mine) >= MOST_OPEN_LIMITED:
                del mine[next(iter(mine))]
            mine[what] = None
            opens.append((at, what))
    return opens


def _active(step: Ids, shard: Ids, steps: int) -> Ids:
    """(steps,) shards between their first and their last use."""
    first = np.unique(shard, return_index=True)[1]  # `shard` is in the order of time
    last = len(shard) - 1 - np.unique(shard[::-1], return_index=True)[1]
    changes = np.zeros(steps + 1, np.int64)
    np.add.at(changes, step[first], 1)
    np.add.at(changes, step[last] + 1, -1)
    return np.cumsum(changes)[:steps]


def _downloads(
    opens: list[tuple[int, int]], sizes: Ids, limit: int | None
) -> tuple[list[tuple[int, int]], int]:
    """(step, shard) of each download, and the most bytes that are cached at a time."""
    cached: OrderedDict[int, int] = OrderedDict()
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


def _cache_needed(opens: list[tuple[int, int]], sizes: Ids) -> int:
    """The least limit with which nothing is downloaded twice: of all second uses, the most that was opened since the first."""
    needed, total = 0, 0
    recent: OrderedDict[int, int] = OrderedDict()  # all shards so far, that of the last opening last
    within: OrderedDict[int, int] = OrderedDict()  # the last ones of these, as many as `needed` holds
    for _, shard in opens:
        size = int(sizes[shard])
        if shard in within:
            within.move_to_end(shard)
        else:
            if shard in recent:
                within.clear()
                total = 0
                for other in reversed(recent):
                    within[other] = recent[other]
                    within.move_to_end(other, last=False)
                    total += recent[other]
                    if other == shard:
                        break
                within.move_to_end(shard)
            else:
                within[shard] = size
                total += size
            needed = max(needed, total if shard in recent else size)
            while total > needed:
                total -= within.popitem(last=False)[1]
        recent[shard] = size
        recent.move_to_end(shard)
    return needed


def _wait(download_seconds: npt.NDArray[np.float64], step_seconds: float, ahead: float) -> float:
    """Share of the epoch's time that is spent waiting. What a step needs is asked for when the step `ahead` of it begins."""
    ahead = max(1, round(ahead))
    begun = [0.0] * len(download_seconds)  # when each step begins
    line, now = 0.0, 0.0  # when the line is free
    for step, seconds in enumerate(download_seconds.tolist()):
        line = max(line, begun[step - ahead] if step >= ahead else 0.0) + seconds
        begun[step] = max(now, line if seconds else 0.0)
        now = begun[step] + step_seconds
    return 1 - len(begun) * step_seconds / now

"""`simulate` predicts what a real run does."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from support.small_datasets import make_record, small_vocabulary, text_records, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.storage import shard_cache
from unitoken.streaming_data.__main__ import app
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.streaming_data.reading.share import WorkerShare
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.tools.simulate import (
    Shape,
    _cache_needed,
    _downloads,
    _packs_of,
    demand_table,
    parse_bandwidth,
    parse_nodes,
    simulate_nodes,
)

VOCABULARY = small_vocabulary()
BATCH = 4


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two datasets of many small shards: more than a process keeps mapped."""
    folder = tmp_path_factory.mktemp("remote")
    write_dataset(folder / "text", text_records(900), shard_bytes=700)
    pictures = [make_record(f"p{n}", VOCABULARY, 3 + n % 5, 1) for n in range(60)]
    write_dataset(folder / "pictures", pictures, shard_bytes=1100)
    return folder


def settings(remote: Path, folder: Path, **more: Any) -> DataConfig:
    streams = {name: {"remote": str(remote / name)} for name in ("text", "pictures")}
    data = {
        "streams": streams,
        "packed_length": 128,
        "global_batch": BATCH,
        "continuous": "none",
        "cache": str(folder),
        **more,
    }
    return DataConfig.model_validate(data)


def on_paper(config: DataConfig, nodes: int, ranks_per_node: int = 1) -> Any:
    (demand,), impossible = simulate_nodes(config, [nodes], ranks_per_node, (384, 14), 1e9, 1.0, None)
    assert not impossible
    return demand


def measured(config: DataConfig, node: int, nodes: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return the downloads and the most bytes that are cached while a node really reads an epoch."""
    monkeypatch.setenv("RANK", str(node))
    monkeypatch.setenv("WORLD_SIZE", str(nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    opened, most = 0, 0
    really_open = shard_cache.Cache.open

    def watched(self: shard_cache.Cache, shard: int) -> Any:
        nonlocal opened, most
        file = really_open(self, shard)
        opened += 1
        (stamp,) = self._stamps.glob(f"{shard:06}-*-downloaded")
        tick = (
            time.time_ns() + opened * 1_000_000
        )  # the file system's clock is too coarse for shards of 700 bytes
        os.utime(stamp, ns=(tick, tick))
        most = max(
            most, sum(int(path.name.split("-")[1]) for path in self._all_stamps.glob("*/*-downloaded"))
        )
        return file

    monkeypatch.setattr(shard_cache.Cache, "open", watched)
    loader = build_loader(config, views=None, vocabulary=VOCABULARY, batch_packs=BATCH // nodes, compat=False)
    loader.dataset.downloads = 1  # with more at a time their order is chance
    for _ in loader:
        pass
    monkeypatch.undo()
    return sum(shards.cache.downloads for shards in loader.dataset._shards), most


@pytest.mark.parametrize("canonical_nodes", [1, 2])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_real_run_downloads_and_caches_as_simulated(
    nodes: int, canonical_nodes: int, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = settings(remote, tmp_path / "paper", canonical_nodes=canonical_nodes)
    everything = on_paper(paper, nodes)
    assert everything.shards > 2 * 64 / nodes
    assert everything.downloads == everything.shards
    enough = everything.cache_bytes
    for limit in (None, enough, enough // 2):
        said = on_paper(paper.model_copy(update={"cache_limit": limit}), nodes)
        found = []
        for node in range(nodes):
            place = tmp_path / f"{limit}-{node}"
            real = settings(
                remote, place, canonical_nodes=canonical_nodes, **({"cache_limit": limit} if limit else {})
            )
            found.append(measured(real, node, nodes, monkeypatch))
        assert said.downloads == max(downloads for downloads, _ in found)
        assert said.most_cached_bytes == max(most for _, most in found)
        if limit is None or limit == enough:
            assert said.downloads == everything.shards
        else:
            assert said.downloads > everything.shards


@pytest.mark.parametrize(("nodes", "canonical_nodes"), [(1, 1), (2, 1), (2, 2), (4, 2), (2, 4)])
def test_nodes_read_the_packs_that_their_ranks_are_given(
    nodes: int, canonical_nodes: int, remote: Path, tmp_path: Path
) -> None:
    config = settings(remote, tmp_path, global_batch=16, canonical_nodes=canonical_nodes)
    plan = build_loader(config, views=None, vocabulary=VOCABULARY, batch_packs=16, compat=False).dataset.plan
    shape = Shape(nodes, 2, 1, 16, canonical_nodes)
    for node in range(nodes):
        packs = _packs_of(plan, shape, node)
        for rank in range(2):
            share = WorkerShare(
                plan,
                0,
                nodes,
                ranks_per_node=2,
                rank=2 * node + rank,
                batch_packs=8 // nodes,
                canonical_nodes=canonical_nodes,
            )
            assert packs[:, rank].tolist() == [batch.tolist() for batch in share]


def test_the_cache_that_is_needed_is_the_least_that_is_enough() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = rng.integers(1, 20, 12)
        opens = [(step, int(shard)) for step, shard in enumerate(rng.integers(0, 12, 40))]
        different = len({shard for _, shard in opens})
        needed = _cache_needed(opens, sizes)
        assert len(_downloads(opens, sizes, needed)[0]) == different
        again = len(opens) - different
        too_little = len(_downloads(opens, sizes, needed - 1)[0]) > different
        assert too_little or not again or needed == max(sizes[shard] for _, shard in opens)


def test_more_processes_and_nodes_that_do_not_divide(remote: Path, tmp_path: Path) -> None:
    config = settings(remote, tmp_path, workers=2)
    demand = on_paper(config, 1, ranks_per_node=2)
    assert demand.downloads == demand.shards  # one cache for all
    assert simulate_nodes(config, [1, 3, 8], 1, (384, 14), 1e9, 1.0, None)[1] == [3, 8]


def test_a_slow_network_makes_training_wait(remote: Path, tmp_path: Path) -> None:
    config = settings(remote, tmp_path)
    fast, slow = (simulate_nodes(config, [1], 1, (384, 14), bits, 0.01, None)[0][0] for bits in (1e12, 1e4))
    assert fast.wait < 0.01
    assert fast.bandwidth < 1
    assert slow.wait > 0.9
    assert slow.bandwidth > 1
    assert slow.hours == fast.hours == pytest.approx(fast.steps * 0.01 / 3600)
    by_tokens = simulate_nodes(config, [2], 1, (384, 14), 1e9, None, 1000.0)[0][0]
    tokens = sum(len(r.tokens) for r in text_records(900))
    assert by_tokens.hours == pytest.approx(tokens / 2 / 1000 / 3600, rel=0.15)  # and the pictures' tokens
    assert len(demand_table([fast, slow], 1 << 30).splitlines()) == 5


@pytest.mark.parametrize("text", ["", "0gbit", "1gb", "x", "1.2.3gbit", "-1gbit"])
def test_a_bandwidth_is_bits_a_second(text: str) -> None:
    assert parse_bandwidth("1.5 Gbit") == 1.5e9
    with pytest.raises(ConfigError, match="500mbit or 10gbit"):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["", "0", "1,x", "-2"])
def test_numbers_of_nodes(text: str) -> None:
    assert parse_nodes("8,1,8") == [1, 8]
    with pytest.raises(ConfigError, match="as 1,2,64"):
        parse_nodes(text)


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_prints_a_table_or_json(remote: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(
        yaml.safe_dump(settings(remote, tmp_path / "cache").model_dump(mode="json", exclude_none=True))
    )
    command = ("simulate", file, "--ranks-per-node", 1, "--batch-seconds", 0.5)
    code, out = run(*command, "--cache-limit", "20kb")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["1", "2", "4"]
    assert "a cache of 20.0 KB" in out
    assert (
        "8, 16, 32, 64, 128, 256, 512, 1024 nodes of 1 ranks can not share a global_batch of 4 packs" in out
    )
    code, out = run(*command, "--json", "--nodes", "2,3", "data.seed=1")
    found = json.loads(out)
    assert ([node["nodes"] for node in found["nodes"]], found["not_possible"]) == ([2], [3])
    assert found["nodes"][0]["downloads"] == found["nodes"][0]["shards"]
    for wrong in ((), ("--batch-seconds", 1, "--tokens-per-second", 1), ("--batch-seconds", 0)):
        code, out = run("simulate", file, *wrong)
        assert code == 2
        assert "give --batch-seconds or --tokens-per-second" in out
    code, out = run(*command, "--nodes", "3,5")
    assert (code, out.count("\n")) == (2, 1)
    assert "3, 5 nodes of 1 ranks can not share a global_batch of 4 packs evenly" in out
    code, out = run(*command, "--cache-limit", "much")
    assert (code, out.count("\n")) == (2, 1)

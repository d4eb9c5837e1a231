"""What lies on this host of remote datasets, within a limit, and what is never deleted."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from support.opened_shards import open_shards, read_all
from support.small_datasets import shard_paths, text_records, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE

RECORDS = text_records(120)
IDS = [record.id for record in RECORDS]


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = write_dataset(tmp_path / "remote", RECORDS)
    assert len(shard_paths(folder)) >= 6
    return folder


def size_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def test_downloaded_shards_keep_within_the_limit(remote, tmp_path):
    limit = size_of(shard_paths(remote)[:3])
    shards = open_shards(tmp_path / "local", remote, limit=limit)
    for shard in range(len(shards.samples)):
        shards.record(shard, 0)
        assert size_of(shard_paths(tmp_path / "local")) <= limit
    assert [path.name for path in shard_paths(tmp_path / "local")] == [
        path.name for path in shard_paths(remote)[-3:]
    ]
    assert [record.id for record in read_all(shards)] == IDS, "what is mapped stays readable"


def test_what_was_opened_longest_ago_goes_first(remote, tmp_path):
    limit = size_of(shard_paths(remote)[:3]) + 500  # shards are not quite of one size
    for n, shard in enumerate((0, 1, 2, 0, 3)):
        open_shards(tmp_path / "local", remote, limit=limit).record(shard, 0)
        for stamp in (tmp_path / "cache").glob(f"*/{shard:06}-*"):
            os.utime(stamp, (n, n))  # clocks of file systems are coarse
    assert [path.name for path in shard_paths(tmp_path / "local")] == [
        "shard.00000.mds",
        "shard.00002.mds",
        "shard.00003.mds",
    ]


def test_an_evicted_shard_comes_back_when_it_is_needed(remote, tmp_path):
    limit = size_of(shard_paths(remote)[:2])
    for _ in range(2):
        shards = open_shards(tmp_path / "local", remote, limit=limit)
        assert [record.id for record in read_all(shards)] == IDS
        assert shards.cache.downloads >= len(shards.samples) - 2


def test_a_limit_below_a_single_shard_is_exceeded_by_that_shard_alone(remote, tmp_path):
    shards = open_shards(tmp_path / "local", remote, limit=1)
    assert [record.id for record in read_all(shards)] == IDS
    assert len(shard_paths(tmp_path / "local")) == 1


def test_what_the_cache_did_not_download_is_never_evicted(remote, tmp_path):
    """A folder that somebody has copied the shards to, and a dataset that is only here."""
    shutil.copytree(remote, tmp_path / "copied")
    copied, own = open_shards(tmp_path / "copied", remote, limit=1), open_shards(remote)
    read_all(copied), read_all(own)
    read_all(open_shards(tmp_path / "local", remote, limit=1))
    assert len(shard_paths(tmp_path / "copied")) == len(shard_paths(remote)) == len(own.samples)


def test_a_file_that_was_put_in_a_downloaded_ones_place_is_not_evicted(remote, tmp_path):
    read_all(open_shards(tmp_path / "local", remote))
    mine = shard_paths(tmp_path / "local")[0]
    mine.unlink()
    mine.write_bytes(b"mine")
    read_all(open_shards(tmp_path / "other", remote, limit=1))
    assert shard_paths(tmp_path / "local") == [mine]


def test_the_limit_is_for_all_streams_of_a_cache(remote, tmp_path):
    limit = size_of(shard_paths(remote))
    for name in ("one", "two"):
        read_all(open_shards(tmp_path / name, remote, limit=limit))
    assert size_of(shard_paths(tmp_path / "one") + shard_paths(tmp_path / "two")) <= limit
    assert len(shard_paths(tmp_path / "two")) == len(shard_paths(remote))


def test_processes_that_evict_each_others_shards_all_read_everything(remote, tmp_path):
    limit = size_of(shard_paths(remote)[:2])
    open_shards(tmp_path / "local", remote)
    context = multiprocessing.get_context("fork")
    jobs = [
        context.Process(target=_read_and_exit, args=(tmp_path / "local", remote, limit)) for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert not list(tmp_path.glob(f"**/{ASIDE}*"))


def _read_and_exit(local: Path, remote: Path, limit: int) -> None:
    for _ in range(5):
        assert [record.id for record in read_all(open_shards(local, remote, limit=limit))] == IDS


def test_what_a_killed_download_left_is_removed_by_the_next_start(remote, tmp_path):
    left = tmp_path / "local" / "chunk-000000" / f"{ASIDE}shard.00000.mds-0123456789ab"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    open_shards(tmp_path / "local", remote)
    assert not left.exists()


def test_a_cache_folder_that_is_anothers_is_a_clear_error(remote, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"the cache folder .*cache.*; set `cache` to one of your own"):
        open_shards(tmp_path / "local", remote)

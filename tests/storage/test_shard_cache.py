"""The cache of remote shards keeps its limit, and never deletes files that it did not download."""

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


def test_downloaded_shards_keep_within_the_limit(remote: Path, tmp_path: Path) -> None:
    limit = size_of(shard_paths(remote)[:3])
    shards = open_shards(tmp_path / "local", remote, limit=limit)
    for shard in range(len(shards.samples)):
        shards.record(shard, 0)
        assert size_of(shard_paths(tmp_path / "local")) <= limit
    assert [path.name for path in shard_paths(tmp_path / "local")] == [
        path.name for path in shard_paths(remote)[-3:]
    ]
    assert [record.id for record in read_all(shards)] == IDS, "mapped shards stay readable"


def test_the_least_recently_opened_shard_is_evicted_first(remote: Path, tmp_path: Path) -> None:
    limit = size_of(shard_paths(remote)[:3]) + 500  # the shards' sizes differ a little
    for n, shard in enumerate((0, 1, 2, 0, 3)):
        open_shards(tmp_path / "local", remote, limit=limit).record(shard, 0)
        for stamp in (tmp_path / "cache").glob(f"*/{shard:06}-*"):
            os.utime(stamp, (n, n))  # the clocks of file systems are coarse
    assert [path.name for path in shard_paths(tmp_path / "local")] == [
        "shard.00000.mds",
        "shard.00002.mds",
        "shard.00003.mds",
    ]


def test_an_evicted_shard_is_downloaded_again_when_needed(remote: Path, tmp_path: Path) -> None:
    limit = size_of(shard_paths(remote)[:2])
    for _ in range(2):
        shards = open_shards(tmp_path / "local", remote, limit=limit)
        assert [record.id for record in read_all(shards)] == IDS
        assert shards.cache.downloads >= len(shards.samples) - 2


def test_a_limit_below_one_shard_keeps_one_shard(remote: Path, tmp_path: Path) -> None:
    shards = open_shards(tmp_path / "local", remote, limit=1)
    assert [record.id for record in read_all(shards)] == IDS
    assert len(shard_paths(tmp_path / "local")) == 1


def test_files_that_the_cache_did_not_download_are_kept(remote: Path, tmp_path: Path) -> None:
    """A folder to which somebody copied the shards, and a dataset that is only local."""
    shutil.copytree(remote, tmp_path / "copied")
    copied, own = open_shards(tmp_path / "copied", remote, limit=1), open_shards(remote)
    read_all(copied), read_all(own)
    read_all(open_shards(tmp_path / "local", remote, limit=1))
    assert len(shard_paths(tmp_path / "copied")) == len(shard_paths(remote)) == len(own.samples)


def test_a_file_that_replaced_a_downloaded_one_is_kept(remote: Path, tmp_path: Path) -> None:
    read_all(open_shards(tmp_path / "local", remote))
    mine = shard_paths(tmp_path / "local")[0]
    mine.unlink()
    mine.write_bytes(b"mine")
    read_all(open_shards(tmp_path / "other", remote, limit=1))
    assert shard_paths(tmp_path / "local") == [mine]


def test_all_streams_of_a_cache_share_the_limit(remote: Path, tmp_path: Path) -> None:
    limit = size_of(shard_paths(remote))
    for name in ("one", "two"):
        read_all(open_shards(tmp_path / name, remote, limit=limit))
    assert size_of(shard_paths(tmp_path / "one") + shard_paths(tmp_path / "two")) <= limit
    assert len(shard_paths(tmp_path / "two")) == len(shard_paths(remote))


def test_processes_that_evict_each_others_shards_read_all(remote: Path, tmp_path: Path) -> None:
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


def test_the_next_start_removes_what_a_killed_download_left(remote: Path, tmp_path: Path) -> None:
    left = tmp_path / "local" / "chunk-000000" / f"{ASIDE}shard.00000.mds-0123456789ab"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    open_shards(tmp_path / "local", remote)
    assert not left.exists()


def test_an_unusable_cache_folder_is_an_error(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"the cache folder .*cache.*; set `cache` to one of your own"):
        open_shards(tmp_path / "local", remote)

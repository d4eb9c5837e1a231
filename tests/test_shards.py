import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
from small_datasets import flip_byte, shard_paths, text_records, write_dataset
from streaming import StreamingDataset

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.manifest import INDEX
from unitoken.streaming_data.record import Record
from unitoken.streaming_data.shards import ShardError, Shards, read_index

RECORDS = text_records(60)


@pytest.fixture
def dataset(tmp_path):
    folder = write_dataset(tmp_path / "data", RECORDS)
    assert len(shard_paths(folder)) > 3
    return folder


def open_shards(folder, remote=None) -> Shards:
    """`folder` itself, or a cache for it beside."""
    if remote is None:
        return Shards(folder, None, folder.parent / "cache")
    folder.mkdir(exist_ok=True)
    shutil.copy(remote / INDEX, folder / INDEX)
    return Shards(folder, str(remote), folder.parent / "cache")


def read_all(shards: Shards) -> list[Record]:
    return [Record.from_mds(shards.sample(shard, i)) for shard, count in enumerate(shards.samples) for i in range(count)]


def test_samples_read_as_upstream_reads_them(dataset):
    ours, theirs = open_shards(dataset), StreamingDataset(local=str(dataset), batch_size=1)
    samples = [ours.sample(shard, i) for shard, count in enumerate(ours.samples) for i in range(count)]
    assert len(samples) == len(theirs) == len(RECORDS)
    for number, sample in enumerate(samples):
        expected = theirs[number]
        assert sample.keys() == expected.keys()
        for column, value in sample.items():
            assert np.array_equal(value, expected[column]), (number, column)


def test_a_flipped_byte_is_an_error_that_names_the_shard(dataset):
    path = shard_paths(dataset)[1]
    flip_byte(path)
    shards = open_shards(dataset)
    shards.sample(0, 0)
    with pytest.raises(ShardError, match=f"the shard {path} is corrupt: its sha1 is .*, the index names"):
        shards.sample(1, 0)


def test_a_shard_that_changes_after_it_was_verified_is_verified_again(dataset):
    read_all(open_shards(dataset))
    flip_byte(shard_paths(dataset)[2])
    with pytest.raises(ShardError, match="corrupt"):
        read_all(open_shards(dataset))


def test_a_shard_is_verified_once_a_host(dataset, monkeypatch):
    read_all(open_shards(dataset))
    monkeypatch.setattr("unitoken.streaming_data.shards._file_hash", lambda *_: pytest.fail("hashed again"))
    read_all(open_shards(dataset))


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_missing_or_short_local_shard_is_an_error_from_the_start(dataset, damage):
    path = shard_paths(dataset)[1]
    path.unlink() if damage == "unlink" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"the shard {path} is {'missing' if damage == 'unlink' else 'corrupt'}"):
        open_shards(dataset)


def test_a_local_shard_that_vanishes_later_is_an_error_that_names_it(dataset):
    shards = open_shards(dataset)
    path = shard_paths(dataset)[1]
    path.unlink()
    with pytest.raises(ShardError, match=f"the shard {path} is missing"):
        shards.sample(1, 0)


def test_remote_shards_are_downloaded_when_they_are_needed(dataset, tmp_path):
    local = tmp_path / "local"
    shards = open_shards(local, dataset)
    shards.sample(1, 0)
    assert [path.name for path in shard_paths(local)] == [shard_paths(dataset)[1].name]
    assert [record.id for record in read_all(shards)] == [record.id for record in RECORDS]
    assert not list(tmp_path.glob("**/.aside*"))


def test_a_corrupt_cached_shard_is_deleted_and_downloaded_again(dataset, tmp_path):
    read_all(open_shards(tmp_path / "local", dataset))
    flip_byte(shard_paths(tmp_path / "local")[0])
    assert [record.id for record in read_all(open_shards(tmp_path / "local", dataset))] == [record.id for record in RECORDS]
    assert shard_paths(tmp_path / "local")[0].read_bytes() == shard_paths(dataset)[0].read_bytes()


def test_a_download_that_arrives_corrupt_is_tried_again_once(dataset, tmp_path, monkeypatch):
    from streaming.base.storage.download import LocalDownloader

    calls = []
    copy = LocalDownloader._download_file_impl

    def damaged_first(self, remote, local, timeout):
        copy(self, remote, local, timeout)
        calls.append(remote)
        if len(calls) == 1:
            with open(local, "r+b") as file:
                file.write(b"\xff")

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", damaged_first)
    open_shards(tmp_path / "local", dataset).sample(0, 0)
    assert len(calls) == 2


def test_a_shard_that_is_corrupt_at_the_remote_is_an_error_and_never_enters_the_cache(dataset, tmp_path):
    flip_byte(shard_paths(dataset)[1])
    shards = open_shards(tmp_path / "local", dataset)
    for _ in range(2):  # the second start finds no corrupt file that it would take for a good one
        with pytest.raises(ShardError, match=rf"{dataset}/chunk-000000/shard.00001.mds is corrupt: its sha1"):
            shards.sample(1, 0)
        assert shard_paths(tmp_path / "local") == []


def test_a_shard_that_is_missing_at_the_remote_is_an_error_that_names_it(dataset, tmp_path):
    shard_paths(dataset)[1].unlink()
    with pytest.raises(ShardError, match=f"cannot download {dataset}/chunk-000000/shard.00001.mds: FileNotFoundError"):
        open_shards(tmp_path / "local", dataset).sample(1, 0)


def test_a_failing_store_is_tried_again_and_then_an_error(dataset, tmp_path, monkeypatch):
    from streaming.base.storage.download import LocalDownloader

    calls = []

    def fail(self, remote, local, timeout):
        calls.append(remote)
        raise TimeoutError("no answer")

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", fail)
    monkeypatch.setattr("unitoken.streaming_data.shards.time.sleep", lambda _: None)
    with pytest.raises(ShardError, match=r"cannot download .*: TimeoutError: no answer"):
        open_shards(tmp_path / "local", dataset).sample(0, 0)
    assert len(calls) == 2


def test_jobs_that_share_a_cache_download_each_shard_once_and_do_not_collide(dataset, tmp_path):
    open_shards(tmp_path / "local", dataset)
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_read_and_exit, args=(tmp_path / "local", dataset)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert not list(tmp_path.glob("**/.aside*"))


def _read_and_exit(local, remote):
    assert [record.id for record in read_all(open_shards(local, remote))] == [record.id for record in RECORDS]


def test_a_pickled_reader_reads_on(dataset):
    shards = open_shards(dataset)
    read_all(shards)
    assert len(read_all(pickle.loads(pickle.dumps(shards)))) == len(RECORDS)


def test_more_shards_than_may_be_open_are_read(dataset, monkeypatch):
    monkeypatch.setattr("unitoken.streaming_data.shards.MOST_OPEN", 2)
    shards = open_shards(dataset)
    assert len(read_all(shards)) == len(RECORDS)
    assert len(shards._open) == 2


def test_columns_that_run_code_are_refused(dataset):
    index = json.loads((dataset / INDEX).read_bytes())
    index["shards"][0]["column_encodings"][0] = "pkl"
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="unsafe"):
        open_shards(dataset)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "json"}, "expected uncompressed MDS version 2, found json"),
        ({"zip_data": {"basename": "x"}, "compression": "zstd"}, "expected uncompressed MDS version 2, found mds, zstd"),
        ({"samples": "many"}, "not an MDS index"),
        ({"raw_data": {}}, "not an MDS index"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(dataset, change, found):
    index = json.loads((dataset / INDEX).read_bytes())
    index["shards"][0].update(change)
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"{dataset / INDEX}: .*{found}"):
        read_index(dataset)


def test_a_shard_with_another_number_of_samples_than_the_index_names_is_corrupt(dataset):
    index = json.loads((dataset / INDEX).read_bytes())
    index["shards"][0]["samples"] += 1
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ShardError, match="corrupt: it holds"):
        open_shards(dataset).sample(0, 0)

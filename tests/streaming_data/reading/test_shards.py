"""Reading, verifying and caching shards."""

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

from support.opened_shards import open_shards, read_all
from support.small_datasets import (
    flip_byte,
    make_record,
    shard_paths,
    small_vocabulary,
    text_records,
    write_dataset,
)
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import INDEX
from unitoken.dataset.mds_index import read_index
from unitoken.dataset.record import Record, columns
from unitoken.storage.folder import Folder
from unitoken.storage.shard_cache import ShardError
from unitoken.storage.store import MissingError, StoreError
from unitoken.streaming_data.reading.shards import Shards

RECORDS = text_records(60)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = write_dataset(tmp_path / "data", RECORDS)
    assert len(shard_paths(folder)) > 3
    return folder


def assert_equal(record: Record, sample: dict) -> None:
    found, expected = record.to_mds(), Record.from_mds(sample).to_mds()
    for column, value in found.items():
        assert np.array_equal(value, expected[column]), column
    assert record.tokens.dtype == expected["tokens"].dtype


@pytest.mark.parametrize("more", [{}, {"quality": "float32", "note": "str"}])
@pytest.mark.parametrize("tokens", ["uint16", "uint32"])
def test_samples_read_as_upstream_reads_them(tmp_path: Path, tokens: str, more: dict[str, str]) -> None:
    """Our own decoder reads our columns; upstream's reads samples with more columns."""
    vocabulary = small_vocabulary()
    records = [make_record(f"r{n}", vocabulary, 2 + n**2 % 400, n % 3, n % 4 // 2) for n in range(40)]
    many = np.array(
        [[n, n + 1] for n in range(0, 700, 2)], np.uint32
    )  # their shape takes more than a byte a side
    long = np.arange(70_000, dtype=np.uint16)
    records.append(Record("ü", long, many, np.zeros((0, 4), np.uint32), ()))
    all_columns = {**columns(1 << 16), "tokens": f"ndarray:{tokens}", **more}
    with MDSWriter(
        out=str(tmp_path / "data"), columns=all_columns, hashes=["sha1"], size_limit=1 << 14
    ) as writer:
        for record in records:
            sample = {**record.to_mds(), "tokens": record.tokens.astype(tokens)}
            writer.write({**sample, **({"quality": np.float32(0.5), "note": "good"} if more else {})})
    ours, theirs = (
        open_shards(tmp_path / "data"),
        StreamingDataset(local=str(tmp_path / "data"), batch_size=1),
    )
    found = read_all(ours)
    assert len(found) == len(theirs) == len(records)
    for number, record in enumerate(found):
        assert_equal(record, theirs[number])


def test_a_flipped_byte_is_an_error_that_names_the_shard(dataset: Path) -> None:
    path = shard_paths(dataset)[1]
    flip_byte(path)
    shards = open_shards(dataset)
    shards.record(0, 0)
    with pytest.raises(ShardError, match=f"the shard {path} is corrupt: its sha1 is .*, the index names"):
        shards.record(1, 0)


def test_a_changed_shard_is_verified_again(dataset: Path) -> None:
    read_all(open_shards(dataset))
    flip_byte(shard_paths(dataset)[2])
    with pytest.raises(ShardError, match="corrupt"):
        read_all(open_shards(dataset))


def test_a_shard_is_verified_once_a_host(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_all(open_shards(dataset))
    monkeypatch.setattr("unitoken.storage.shard_cache._hash_file", lambda *_: pytest.fail("hashed again"))
    read_all(open_shards(dataset))


@pytest.mark.parametrize("damage", ["unlink", "truncate"])
def test_a_missing_or_short_local_shard_is_an_error_at_once(dataset: Path, damage: str) -> None:
    path = shard_paths(dataset)[1]
    path.unlink() if damage == "unlink" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match=f"the shard {path} is {'missing' if damage == 'unlink' else 'corrupt'}"
    ):
        open_shards(dataset)


def test_a_local_shard_that_vanishes_later_is_named(dataset: Path) -> None:
    shards = open_shards(dataset)
    path = shard_paths(dataset)[1]
    path.unlink()
    with pytest.raises(ShardError, match=f"the shard {path} is missing"):
        shards.record(1, 0)


def test_remote_shards_are_downloaded_when_they_are_needed(dataset: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    shards = open_shards(local, dataset)
    shards.record(1, 0)
    assert [path.name for path in shard_paths(local)] == [shard_paths(dataset)[1].name]
    assert [record.id for record in read_all(shards)] == [record.id for record in RECORDS]
    assert not list(tmp_path.glob("**/.aside*"))


def test_a_corrupt_cached_shard_is_deleted_and_downloaded_again(dataset: Path, tmp_path: Path) -> None:
    read_all(open_shards(tmp_path / "local", dataset))
    flip_byte(shard_paths(tmp_path / "local")[0])
    assert [record.id for record in read_all(open_shards(tmp_path / "local", dataset))] == [
        record.id for record in RECORDS
    ]
    assert shard_paths(tmp_path / "local")[0].read_bytes() == shard_paths(dataset)[0].read_bytes()


def test_a_download_that_arrives_corrupt_is_tried_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    read = Folder.read_range

    def damaged_first(self: Folder, name: str, start: int, end: int) -> bytes:
        calls.append(name)
        data = read(self, name, start, end)
        return b"\xff" + data[1:] if len(calls) == 1 else data

    monkeypatch.setattr(Folder, "read_range", damaged_first)
    open_shards(tmp_path / "local", dataset).record(0, 0)
    assert len(calls) == 2


def test_a_large_shard_comes_in_parts(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitoken.storage.shard_cache.PART_BYTES", 100)
    assert [record.id for record in read_all(open_shards(tmp_path / "local", dataset))] == [
        record.id for record in RECORDS
    ]
    assert [path.read_bytes() for path in shard_paths(tmp_path / "local")] == [
        path.read_bytes() for path in shard_paths(dataset)
    ]


def test_a_shard_that_is_corrupt_remotely_never_enters_the_cache(dataset: Path, tmp_path: Path) -> None:
    flip_byte(shard_paths(dataset)[1])
    shards = open_shards(tmp_path / "local", dataset)
    for _ in range(2):  # the second start finds no corrupt file in the cache
        with pytest.raises(ShardError, match=rf"{dataset}/chunk-000000/shard.00001.mds is corrupt: its sha1"):
            shards.record(1, 0)
        assert shard_paths(tmp_path / "local") == []


def test_a_shard_missing_remotely_is_named_with_its_place(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unitoken.storage.shard_cache.PAUSE", 0)
    shard_paths(dataset)[1].unlink()
    shard = "chunk-000000/shard.00001.mds"
    with pytest.raises(
        ShardError, match=f"stream 'a': the shard {shard} cannot be downloaded: {dataset}/{shard}: not there"
    ):
        open_shards(tmp_path / "local", dataset).record(1, 0)


def test_a_shard_reported_missing_once_is_requested_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy in front of a store may not be as consistent as the store."""
    monkeypatch.setattr("unitoken.storage.shard_cache.PAUSE", 0)
    answers = [MissingError("404")]
    read = Folder.read_range

    def missing_first(self: Folder, *args: Any) -> bytes:
        if answers:
            raise answers.pop()
        return read(self, *args)

    monkeypatch.setattr(Folder, "read_range", missing_first)
    assert open_shards(tmp_path / "local", dataset).record(0, 0).id == RECORDS[0].id


def test_a_store_that_fails_for_good_is_an_error_at_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has already tried again for its time."""
    calls = []

    def fail(self: Folder, name: str, *_: Any) -> NoReturn:
        calls.append(name)
        raise StoreError(f"{self.url}/{name}: no answer (tried for 40 s)")

    monkeypatch.setattr(Folder, "read_range", fail)
    with pytest.raises(
        ShardError, match=r"stream 'a': the shard .* cannot be downloaded: .*: no answer \(tried for 40 s\)"
    ):
        open_shards(tmp_path / "local", dataset).record(0, 0)
    assert len(calls) == 1
    assert not list(tmp_path.glob("**/.aside*"))


def test_jobs_that_share_a_cache_download_each_shard_once(dataset: Path, tmp_path: Path) -> None:
    open_shards(tmp_path / "local", dataset)
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_read_and_exit, args=(tmp_path / "local", dataset)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert not list(tmp_path.glob("**/.aside*"))


def _read_and_exit(local: Path, remote: Path) -> None:
    assert [record.id for record in read_all(open_shards(local, remote))] == [record.id for record in RECORDS]


def test_a_pickled_reader_reads_on(dataset: Path) -> None:
    shards = open_shards(dataset)
    read_all(shards)
    assert len(read_all(pickle.loads(pickle.dumps(shards)))) == len(RECORDS)


def test_more_shards_than_may_be_mapped_are_read(dataset: Path) -> None:
    shards = Shards("a", dataset, read_index(dataset), None, dataset.parent / "cache", most_mapped=2)
    assert len(read_all(shards)) == len(RECORDS)
    assert len(shards.mapped) == 2


def test_columns_that_run_code_are_refused(dataset: Path) -> None:
    index = json.loads((dataset / INDEX).read_bytes())
    index["shards"][0]["column_encodings"][0] = "pkl"
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"expected the columns .*found .*pkl"):
        open_shards(dataset)
    index["shards"][0]["column_encodings"][0] = "str"
    index["shards"][0]["column_names"].append("z")
    index["shards"][0]["column_encodings"].append("pkl")
    index["shards"][0]["column_sizes"].append(None)
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="unsafe"):
        open_shards(dataset)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "json"}, "expected uncompressed MDS version 2, found json"),
        (
            {"zip_data": {"basename": "x"}, "compression": "zstd"},
            "expected uncompressed MDS version 2, found mds, zstd",
        ),
        ({"samples": "many"}, "not an MDS index"),
        ({"raw_data": {}}, "not an MDS index"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(dataset: Path, change: dict[str, Any], found: str) -> None:
    index = json.loads((dataset / INDEX).read_bytes())
    index["shards"][0].update(change)
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"{dataset / INDEX}: .*{found}"):
        read_index(dataset)


def test_a_shard_with_a_wrong_number_of_samples_is_corrupt(dataset: Path) -> None:
    index = json.loads((dataset / INDEX).read_bytes())
    index["shards"][0]["samples"] += 1
    (dataset / INDEX).write_text(json.dumps(index))
    with pytest.raises(ShardError, match="corrupt: it holds"):
        open_shards(dataset).record(0, 0)

"""The index and the layout of shards, as mosaicml-streaming writes them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from support.small_datasets import shard_paths, text_records, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.dataset.mds_index import SHARD_NAME, dump_index, read_index, shard_columns, shard_offsets
from unitoken.dataset.record import columns


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", text_records(40))


def test_the_layout_is_that_of_streamings_own_writer(dataset: Path) -> None:
    for entry, path in zip(read_index(dataset), shard_paths(dataset), strict=True):
        data = path.read_bytes()
        offsets = shard_offsets(data, entry["samples"])
        assert len(offsets) == entry["samples"] + 1
        assert offsets[-1] == len(data)
        assert list(shard_columns(entry)) == sorted(columns(100))
        assert SHARD_NAME.fullmatch(path.name)


def test_an_index_is_read_back(tmp_path: Path, dataset: Path) -> None:
    entries = read_index(dataset)
    (tmp_path / "index.json").write_bytes(dump_index(entries))
    assert read_index(tmp_path) == entries
    assert json.loads(dump_index(entries, 3))["turns_left_out"] == 3
    assert "turns_left_out" not in json.loads(dump_index(entries))


@pytest.mark.parametrize("basename", ["", "/etc/passwd", "../shard", "a\\b", "a\0b"])
def test_a_shard_outside_the_folder_is_an_error(tmp_path: Path, dataset: Path, basename: str) -> None:
    entries = read_index(dataset)
    entries[0]["raw_data"]["basename"] = basename
    (tmp_path / "index.json").write_bytes(dump_index(entries))
    with pytest.raises(ConfigError, match=r"index\.json: the shard name .* leads out of the folder"):
        read_index(tmp_path)


def shard(*offsets: int, size: int = 40) -> bytes:
    header = struct.pack(f"<{len(offsets) + 1}I", len(offsets) - 1, *offsets)
    return header + bytes(size - len(header))


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        (b"1234", "4 bytes are too few for a shard"),
        (shard(12, 40), "it holds 1 samples, index.json names 2"),
        (shard(16, 30, 40)[:12], "12 bytes are too few for the offsets of 2 samples"),
        (shard(15, 30, 40), "not ascending up to its end"),
        (shard(16, 30, 39), "not ascending up to its end"),
        (shard(16, 41, 40), "not ascending up to its end"),
    ],
)
def test_a_broken_shard_is_an_error(data: bytes, needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        shard_offsets(data, 2)


def test_the_offsets_of_a_shard() -> None:
    assert shard_offsets(shard(16, 16, 40), 2).tolist() == [16, 16, 40]


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"column_names": ["a"]}, "three lists of one length"),
        ({"column_names": ["a", "a"]}, "three lists of one length"),
        ({"column_encodings": ["str", 3]}, "three lists of one length"),
        ({"column_sizes": "12"}, "three lists of one length"),
        ({"column_sizes": [None, -1]}, "expected numbers or null"),
        ({"column_sizes": [None, True]}, "expected numbers or null"),
    ],
)
def test_columns_that_do_not_match_are_an_error(change: dict[str, Any], needed: str) -> None:
    entry = {"column_names": ["a", "b"], "column_encodings": ["str", "int"], "column_sizes": [None, 8]}
    assert shard_columns(entry) == {"a": "str", "b": "int"}
    with pytest.raises(ValueError, match=needed):
        shard_columns(entry | change)

"""All formats: from a store as from a folder, and what the ending of a name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.arrow_files import some_rows, write_arrow, write_parquet
from support.read_sources import source_of, values_of
from support.services import CLOUDS, started, used
from support.tars import tar_of
from unitoken.common.errors import ConfigError
from unitoken.storage.folder import Folder
from unitoken.storage.open import open_store
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.reader import cut, find_files


def test_a_failing_store_is_not_taken_for_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise items would be rejected when the network is down."""
    paths = [
        write_parquet(tmp_path / "i.parquet", some_rows(50), 10),
        write_arrow(tmp_path / "i.arrow", some_rows(50), 10),
        tar_of(tmp_path / "i.tar", [("1.jpg", b"1")]),
    ]
    whole_folder = Folder(tmp_path)
    for path in paths:
        source, reads = source_of(path), 0

        class Failing(Folder):
            def read_range(self, name: str, start: int, end: int) -> bytes:
                nonlocal reads
                reads += 1
                if reads > (3 if name == "i.parquet" else 0):
                    raise StoreError("the store is gone")
                return whole_folder.read_range(name, start, end)

        failing = Failing(tmp_path)
        monkeypatch.setattr(reader, "open_store", lambda url, failing=failing: failing)
        with pytest.raises(StoreError, match="the store is gone"):
            values_of(source)
        with pytest.raises(ConfigError, match="cannot read the input: the store is gone"):
            cut(source.files, 10)
        monkeypatch.undo()


@pytest.mark.cloud
@pytest.mark.parametrize("scheme", CLOUDS)
def test_every_format_is_read_from_a_store_as_from_a_folder(scheme: str, tmp_path: Path) -> None:
    rows, folder = some_rows(30), tmp_path / "data"
    plain = [{"n": n} for n in range(30)]
    folder.mkdir()
    write_parquet(folder / "i.parquet", rows, 8)
    (folder / "hf").mkdir()
    write_arrow(folder / "hf" / "data.arrow", rows, 8)
    (folder / "hf" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (folder / "i.json").write_text(json.dumps(plain))
    (folder / "i.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in plain))
    for number in range(2):
        tar_of(
            folder / f"x-{number}.tar",
            [(f"{number}{n}.json", json.dumps(one).encode()) for n, one in enumerate(plain)],
        )
    with started(scheme, tmp_path / scheme) as service, used(service):
        url = service.url("data")
        for path in folder.rglob("*.*"):
            open_store(url).write(path.relative_to(folder).as_posix(), path.read_bytes())
        for name in ("i.parquet", "hf", "i.json", "i.jsonl", "x-*.tar"):
            here, there = (cut(find_files([f"{place}/{name}"]), 7) for place in (folder, url))
            assert [Path(file.name).name for file in there.files] == [
                Path(file.name).name for file in here.files
            ]
            assert there.pieces == here.pieces
            assert values_of(there) == values_of(here)
        with pytest.raises(ConfigError, match=r"none\.json: cannot read the input: No such file"):
            find_files([f"{url}/none.json"])


def test_a_compressed_table_of_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.parquet.gz").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"i\.parquet\.gz: a table of columns is not read from a \.gz file: unpack it"
    ):
        find_files([str(tmp_path / "i.parquet.gz")])


@pytest.mark.parametrize("name", ["i.zip", "i.doc", "i.json.bz2", "i.gz"])
def test_an_unknown_ending_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    if name == "i.gz":
        return  # a compressed file without another ending is taken for JSON
    with pytest.raises(ConfigError, match=r"a file of an unknown type .*; known are \.json, \.jsonl"):
        find_files([str(tmp_path / name)])

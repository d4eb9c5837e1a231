"""A chunk is published as a whole or not at all, in a folder and in a bucket."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unitoken.common import files
from unitoken.storage.folder import Folder
from unitoken.storage.store import StoreError
from unitoken.tokenize import output as output_module
from unitoken.tokenize.output import Output


class Bucket(Folder):
    """Behaves like a bucket: files arrive one by one, in the order of `uploads`."""

    def __init__(self, path: Path, fails_at: str = "") -> None:
        super().__init__(path)
        self.uploads: list[str] = []
        self.fails_at = fails_at

    def upload(self, path: Path, name: str) -> None:
        if self.fails_at and name.endswith(self.fails_at):
            raise StoreError(f"{name}: the connection was lost")
        super().upload(path, name)
        self.uploads.append(name)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    store = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(output_module, "open_store", lambda url: store)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    return store


def fill(output: Output, name: str, publish: bool = True) -> Path:
    with output.chunk(name) as folder:
        for file in ("index.json", "shard.00000.mds", "shard.00001.mds", "a-file-sorted-before"):
            (folder.path / file).write_text(file)
        if publish:
            folder.publish()
    return folder.path


def scratch(tmp_path: Path) -> list[Path]:
    return [path for folder in tmp_path.glob("unitoken-*") for path in folder.iterdir()]


@pytest.mark.parametrize("url", ["folder", "s3://bucket/out"])
def test_a_chunk_is_done_once_it_is_published(
    url: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    if "://" not in url:
        monkeypatch.setattr(output_module, "open_store", lambda url: Folder(Path(url)))
    output = Output(url)
    fill(output, "chunk-000001", publish=False)
    assert output.done() == set()
    assert not output.is_done("chunk-000001")
    path = fill(output, "chunk-000001")
    assert output.done() == {"chunk-000001"}
    assert output.is_done("chunk-000001")
    assert output.store.read("chunk-000001/shard.00001.mds") == b"shard.00001.mds"
    assert not path.exists()


def test_the_index_is_uploaded_last_and_nothing_stays_behind(bucket: Bucket, tmp_path: Path) -> None:
    fill(Output("s3://bucket/out"), "chunk-000000")
    assert len(bucket.uploads) == 4
    assert bucket.uploads[-1] == "chunk-000000/index.json"
    assert scratch(tmp_path) == []


@pytest.mark.parametrize("name", ["shard.00001.mds", "index.json"])
def test_a_failed_upload_leaves_the_chunk_undone(name: str, bucket: Bucket, tmp_path: Path) -> None:
    output = Output("s3://bucket/out")
    bucket.fails_at = name
    with pytest.raises(StoreError, match="the connection was lost"):
        fill(output, "chunk-000000")
    assert output.done() == set()
    assert scratch(tmp_path) == []
    bucket.fails_at = ""
    fill(output, "chunk-000000")
    assert output.done() == {"chunk-000000"}


def test_the_rest_of_a_killed_upload_is_removed(bucket: Bucket, tmp_path: Path) -> None:
    output = Output("s3://bucket/out")
    with output.chunk("chunk-000001") as mine:
        abandoned = mine.path.with_name(".aside-chunk-000000-0123456789ab")
        abandoned.mkdir()
        abandoned.with_name(abandoned.name + ".lock").touch()
        for path in (abandoned, abandoned.with_name(abandoned.name + ".lock")):
            os.utime(path, (1, 1))
        os.utime(mine.path, (1, 1))
        output.remove_abandoned()
        assert not abandoned.exists()
        assert mine.path.exists()


@pytest.mark.parametrize("url", ["folder", "s3://bucket/out"])
def test_the_first_claim_stays(
    url: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "://" not in url:
        monkeypatch.setattr(output_module, "open_store", lambda url: Folder(Path(url)))
    output = Output(url)
    assert output.claim("job.json", b"one") == b"one"
    assert output.claim("job.json", b"two") == b"one"


def test_of_two_claims_at_the_same_moment_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run writes after our read and before our link."""
    output = Output(str(tmp_path))
    link = os.link

    def beaten(source: Path, target: Path) -> None:
        target.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(output_module.os, "link", beaten)
    assert output.claim("job.json", b"ours") == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]

"""The methods of `Store` do the same in a local folder and in three clouds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.services import CLOUDS, started, used
from unitoken.common.errors import ConfigError
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, Store, StoreError, is_url, join, split

ANYWHERE = ["folder", *(pytest.param(scheme, marks=pytest.mark.cloud) for scheme in CLOUDS)]


@pytest.fixture(scope="module", params=ANYWHERE)
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL or path of an empty folder."""
    folder = tmp_path_factory.mktemp("location")
    if request.param == "folder":
        yield str(folder / "folder")
        return
    with started(request.param, folder / request.param) as service, used(service):
        yield service.url("a/folder")


@pytest.fixture
def store(location: str, request: pytest.FixtureRequest) -> Store:
    return open_store(join(location, request.node.originalname))


def test_a_written_file_is_read(store: Store) -> None:
    for data in (b"0123456789", b"", b"again, and longer than before", b"short"):
        store.write("deep/down/file", data)
        assert store.read("deep/down/file") == data
        assert store.size("deep/down/file") == len(data)


def test_ranges_are_slices(store: Store) -> None:
    data = bytes(range(100))
    store.write("file", data)
    store.write("empty", b"")
    for start, end in ((0, 1), (0, 100), (17, 53), (99, 100), (90, 200), (100, 110), (500, 600), (5, 5)):
        assert store.read_range("file", start, end) == data[start:end], (start, end)
    assert store.read_range("empty", 0, 10) == b""


def test_an_open_file_is_seekable(store: Store) -> None:
    data = os.urandom(1 << 20) * 9  # more than one request
    store.write("file", data)
    with store.open("file") as file:
        assert file.read(3) == data[:3]
        file.seek(-5, os.SEEK_END)
        assert file.read() == data[-5:]
        file.seek(1 << 20)
        assert file.read(1 << 23) == data[1 << 20 :][: 1 << 23]
        assert file.tell() == 9 << 20


def test_a_missing_file_is_an_error(store: Store) -> None:
    for call in (
        store.read,
        store.size,
        store.version,
        store.open,
        lambda name: store.read_range(name, 0, 5),
    ):
        with pytest.raises(MissingError, match="no/such: not there"):
            call("no/such")
    store.delete("no/such")
    assert store.sizes() == {}


def test_files_are_listed_by_prefix(store: Store) -> None:
    for name in ("chunk-1/b", "chunk-1/a", "chunk-10/a", "other", "chunk-1/deep/c"):
        store.write(name, name.encode())
    every = {name: len(name) for name in ("chunk-1/a", "chunk-1/b", "chunk-1/deep/c", "chunk-10/a", "other")}
    assert store.sizes() == every
    assert list(store.sizes("chunk-1/")) == ["chunk-1/a", "chunk-1/b", "chunk-1/deep/c"]
    assert list(store.sizes("chunk-1")) == ["chunk-1/a", "chunk-1/b", "chunk-1/deep/c", "chunk-10/a"]
    assert list(store.sizes("chunk-1/de")) == ["chunk-1/deep/c"]
    assert store.sizes("none/") == {}


def test_a_deleted_file_is_gone(store: Store) -> None:
    store.write("a", b"1")
    store.write("b", b"1")
    store.delete("a")
    assert list(store.sizes()) == ["b"]


def test_a_file_is_uploaded(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"", os.urandom(20 << 20)):
        path.write_bytes(data)
        store.upload(path, "there/file")
        assert store.read("there/file") == data


def test_a_missing_local_file_is_not_uploaded(store: Store, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        store.upload(tmp_path / "nothing", "file")
    assert store.sizes() == {}


def test_the_version_follows_the_content(store: Store) -> None:
    store.write("file", b"one")
    first = store.version("file")
    assert store.version("file") == first
    store.write("file", b"two")
    assert store.version("file") != first


def test_names_may_hold_any_character_but_a_line_break(store: Store) -> None:
    names = ["with space", "ü/ñ.txt", "a+b&c=d", "per%20cent", "hash#tag", "question?.txt"]
    for name in names:
        store.write(name, name.encode())
    assert sorted(store.sizes()) == sorted(names)
    assert [store.read(name).decode() for name in names] == names


def test_a_store_works_in_threads_and_after_pickling(store: Store) -> None:
    """1,100 files are more than a page of a listing."""
    names = [f"file-{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.write(name, name.encode()), names))
        assert list(store.sizes()) == names
        assert [data.decode() for data in pool.map(store.read, names[::10])] == names[::10]
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    assert again.read("file-0003") == b"file-0003"


def _read_in_child(store: Store, result: object) -> None:
    result.send(store.read("file"))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_makes_its_own_connection(store: Store) -> None:
    store.write("file", b"content")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read_in_child, args=(store, sender))
    process.start()
    assert receiver.poll(20), "no answer"
    assert receiver.recv() == b"content"
    process.join()


def test_paths_and_urls_are_joined_and_split() -> None:
    assert is_url("s3://bucket/a")
    assert not is_url("/data/a:b")
    assert join("s3://bucket/a/", "b.png") == "s3://bucket/a/b.png"
    assert join("folder", "b.png") == "folder/b.png"
    assert join("folder", "/abs/b.png") == "/abs/b.png"
    assert join("s3://bucket/a", "https://host/b.png") == "https://host/b.png"
    assert split("s3://bucket/a/b.json") == ("s3://bucket/a", "b.json")
    assert split("b.json") == (".", "b.json")
    assert split("/b.json") == ("/", "b.json")


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"ftp://host/x: expected a path or a URL that begins with s3://, gs://, az:// or hf://",
    ):
        open_store("ftp://host/x")


def test_reading_a_folder_as_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    store = open_store(str(tmp_path))
    with pytest.raises(StoreError, match=r"folder: Is a directory"):
        store.read("folder")

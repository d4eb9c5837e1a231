"""Training reads datasets from every kind of store: the same batches as locally, with a fresh cache."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.services import started, used
from support.small_datasets import small_vocabulary, text_records, write_dataset
from unitoken.common.errors import ConfigError
from unitoken.storage import retry
from unitoken.storage.huggingface import HuggingFace
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, StoreError
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.streaming_data.settings import DataConfig


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in "ab":
        write_dataset(root / name, text_records(80, name))
    return root


def batches(cache: Path, streams: dict[str, dict[str, str]], workers: int = 0) -> list[list[list[int]]]:
    config = DataConfig.model_validate(
        {
            "streams": streams,
            "packed_length": 64,
            "global_batch": 4,
            "continuous": "none",
            "cache": str(cache),
            "workers": workers,
        }
    )
    loader = build_loader(config, views=None, vocabulary=small_vocabulary(), batch_packs=4, compat=False)
    return [batch["input_ids"].tolist() for batch in loader]


def upload(folder: Path, url: str, endpoint: str | None = None) -> None:
    store = open_store(url, endpoint)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, path.relative_to(folder).as_posix())


@pytest.mark.cloud
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_dataset_in_a_bucket_gives_the_same_batches(scheme: str, datasets: Path, tmp_path: Path) -> None:
    expected = batches(tmp_path / "local", {"a": {"local": str(datasets / "a")}})
    with started(scheme, tmp_path / scheme) as service, used(service):
        upload(datasets / "a", service.url("a"))
        for workers in (0, 2):
            assert (
                batches(tmp_path / f"cache-{workers}", {"a": {"remote": service.url("a")}}, workers)
                == expected
            )


@pytest.mark.cloud
def test_each_stream_may_have_a_server_of_its_own(datasets: Path, tmp_path: Path) -> None:
    expected = batches(tmp_path / "local", {name: {"local": str(datasets / name)} for name in "ab"})
    with started("s3", tmp_path / "one") as one, started("s3", tmp_path / "two") as two, used(one):
        endpoints = {"a": one.environment["S3_ENDPOINT_URL"], "b": two.environment["S3_ENDPOINT_URL"]}
        for name, endpoint in endpoints.items():
            upload(datasets / name, "s3://bucket/data", endpoint)
        streams = {
            name: {"remote": "s3://bucket/data", "endpoint": endpoint} for name, endpoint in endpoints.items()
        }
        assert batches(tmp_path / "cache", streams) == expected


class _HubServer(http.server.SimpleHTTPRequestHandler):
    """Answers requests for the files of a dataset as the Hub does, and refuses those without the token."""

    folder: Path

    def do_GET(self) -> None:
        prefix, name = "/datasets/lab/cats/resolve/v1/", ""
        if self.path.startswith(prefix):
            name = self.path.removeprefix(prefix)
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, b"")
        if self.path.startswith("/api/datasets/lab/cats/tree/v1/"):
            file = {"type": "file", "path": "deep/index.json", "size": 3}
            folder = {"type": "directory", "path": "deep/x"}
            return self.answer(200, json.dumps([file, folder]).encode())
        path = self.folder / name.removeprefix("deep/")
        if not name.startswith("deep/") or not path.is_file():
            return self.answer(404, b"")
        data = path.read_bytes()
        if "Range" not in self.headers:
            return self.answer(200, data)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        return self.answer(206, data[int(first) : int(last) + 1])

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    open_store.cache_clear()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_HubServer,), {"folder": datasets / "a"})
    ) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("HF_TOKEN", "secret")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield "hf://datasets/lab/cats@v1/deep"
        server.shutdown()
    open_store.cache_clear()


def test_a_dataset_on_the_hub_gives_the_same_batches(hub: str, datasets: Path, tmp_path: Path) -> None:
    expected = batches(tmp_path / "local", {"a": {"local": str(datasets / "a")}})
    assert batches(tmp_path / "cache", {"a": {"remote": hub}}) == expected


def test_the_hub_is_a_store_for_reading(hub: str, datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(hub)
    data = (datasets / "a" / "index.json").read_bytes()
    assert store.read("index.json") == data
    assert store.read_range("index.json", 3, 10) == data[3:10]
    assert store.size("index.json") == len(data)
    assert store.sizes() == {"index.json": 3}
    with pytest.raises(MissingError, match=r"hf://datasets/lab/cats@v1/deep/none: not there"):
        store.read("none")
    with pytest.raises(StoreError, match="for reading only"):
        store.write("file", b"1")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    open_store.cache_clear()
    with pytest.raises(StoreError, match="permission denied"):
        open_store(hub).read("index.json")


@pytest.mark.parametrize("url", ["hf://models/lab/cats", "hf://datasets/lab", "hf://datasets"])
def test_a_url_that_names_no_dataset_of_the_hub_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected hf://datasets/owner/name"):
        HuggingFace(url, None, 1.0)


@pytest.mark.cloud
def test_an_export_goes_from_bucket_to_bucket(datasets: Path, tmp_path: Path) -> None:
    from unitoken.streaming_data.tools.export_webdataset import export_webdataset

    with started("s3", tmp_path / "s3") as service, used(service):
        upload(datasets / "a", service.url("a"))
        assert export_webdataset(service.url("a"), service.url("tars"), 50) == 2
        assert export_webdataset(str(datasets / "a"), str(tmp_path / "tars"), 50) == 2
        for name in ("000000.tar", "000001.tar", "webdataset.json"):
            assert open_store(service.url("tars")).read(name) == (tmp_path / "tars" / name).read_bytes()
    shutil.rmtree(tmp_path / "tars")

"""The clouds' libraries with failing servers and with credentials. The servers are a few lines of HTTP."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.services import ACCOUNT, ACCOUNT_KEY, CLOUDS, started, used
from unitoken.common.errors import ConfigError
from unitoken.storage import retry
from unitoken.storage.bucket import Bucket
from unitoken.storage.open import open_bucket, open_store
from unitoken.storage.s3 import S3
from unitoken.storage.store import MissingError, StoreError, TransientStoreError

URLS = {"s3": "s3://name/folder", "gs": "gs://name/folder", "az": "az://name/folder"}
DATA = b"the whole content"
HANG_UP, HALF = -1, -2  # in place of a status


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers with the statuses of a list, one after the other, and from then on with DATA."""

    protocol_version = "HTTP/1.1"  # boto3 waits a second for "100 Continue"
    answers: list[int]
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = self.answers.pop(0) if self.answers else 200
        if status == HANG_UP:
            self.close_connection = True
            return
        self.send_response(200 if status == HALF else status)
        body = DATA if status in (200, HALF) else b""
        if "Range" in self.headers or "x-ms-range" in self.headers:  # Azure's library needs it
            self.send_header("Content-Range", f"bytes 0-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"tag"')
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if status == HALF else body)
        self.close_connection = status == HALF

    do_PUT = do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


Answering = Callable[[list[int]], list[str]]


@pytest.fixture(params=CLOUDS)
def cloud(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, list[int], list[str]]]:
    """The URL of a folder, the list of statuses that its server will answer, and the list of its requests."""
    answers: list[int] = []
    requests: list[str] = []
    handler = type("Handler", (Failing,), {"answers": answers, "requests": requests})
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    open_store.cache_clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        point_to(f"http://127.0.0.1:{server.server_address[1]}", monkeypatch)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield URLS[request.param], answers, requests
        server.shutdown()
    open_store.cache_clear()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    account = f"AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};BlobEndpoint={address}/{ACCOUNT}"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")


def test_transient_errors_are_repeated(cloud: tuple[str, list[int], list[str]]) -> None:
    url, answers, requests = cloud
    answers += [503, 500, 429, 408, HANG_UP, HALF]
    assert open_store(url).read("file") == DATA
    assert len(requests) == 7


@pytest.mark.parametrize("name", CLOUDS)
def test_refused_connections_are_repeated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.05)
    handler = type("Handler", (Failing,), {"answers": [], "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.server_bind()  # without listening
    point_to(f"http://127.0.0.1:{server.server_address[1]}", monkeypatch)
    open_store.cache_clear()
    with server:
        store = open_store(URLS[name])
        with pytest.raises(TransientStoreError, match=r"\(tried for 0 s\)"):
            open_store(URLS[name], patience=0.2).read("file")

        def listen() -> None:
            server.server_activate()
            server.serve_forever(poll_interval=0.02)

        threading.Timer(0.5, listen).start()
        assert store.read("file") == DATA
        server.shutdown()
    open_store.cache_clear()


def test_permanent_errors_are_not_repeated(cloud: tuple[str, list[int], list[str]]) -> None:
    url, answers, requests = cloud
    store = open_store(url)
    for status, error, words in (
        (404, MissingError, "/folder/file: not there"),
        (401, StoreError, r"/folder/file: permission denied (with|at) \S"),
        (403, StoreError, r"/folder/file: permission denied (with|at) \S"),
        (400, StoreError, "/folder/file: .*400|[Bb]ad"),
    ):
        answers.append(status)
        with pytest.raises(error, match=words):
            store.read("file")
    assert len(requests) == 4


def test_a_missing_bucket_is_not_a_missing_file(cloud: tuple[str, list[int], list[str]]) -> None:
    url, answers, _ = cloud
    store = open_store(url)
    answers += [404] * 2
    for call in (lambda: store.sizes(), lambda: store.write("file", b"1")):
        with pytest.raises(StoreError, match="no such bucket: name"):
            call()


def test_a_server_that_keeps_failing_is_an_error(
    cloud: tuple[str, list[int], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, answers, requests = cloud
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.05)
    answers += [503] * 1000
    (tmp_path / "file").write_bytes(b"1")
    store = open_store(url, patience=0.4)
    for call in (
        lambda: store.read("file"),
        lambda: store.sizes(),
        lambda: store.upload(tmp_path / "file", "file"),
    ):
        begun = len(requests)
        with pytest.raises(StoreError, match=rf"{url}/.*\(tried for 0 s\)"):
            call()
        assert len(requests) - begun > 2


@pytest.mark.parametrize("scheme", CLOUDS)
def test_a_server_that_does_not_exist_is_an_error(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    open_store.cache_clear()
    with pytest.raises(StoreError, match=r"name/folder/file: .*(refused|connect)"):
        open_store(URLS[scheme], patience=0.3).read("file")
    open_store.cache_clear()


def test_an_upload_of_another_size_is_deleted(
    cloud: tuple[str, list[int], list[str]], tmp_path: Path
) -> None:
    """The server reports another size than was sent."""
    url, _, _ = cloud
    (tmp_path / "file").write_bytes(b"123")
    store = open_store(url)
    deleted: list[str] = []
    assert isinstance(store, Bucket)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(store, "_put", lambda key, file: None)
        patch.setattr(store, "_remove", deleted.append)
        patch.setattr(store, "_head", lambda key: (17, "version"))
        with pytest.raises(StoreError, match="17 bytes arrived of 3"):
            store.upload(tmp_path / "file", "file")
    assert deleted == ["folder/file"]


@pytest.mark.cloud
@pytest.mark.parametrize(
    ("scheme", "secret"), [("s3", "AWS_SECRET_ACCESS_KEY"), ("az", "AZURE_ACCOUNT_ACCESS_KEY")]
)
def test_wrong_credentials_are_an_error_at_once(scheme: str, secret: str, tmp_path: Path) -> None:
    with started(scheme, tmp_path / scheme) as service:
        service.environment[secret] = "d3Jvbmc="
        with used(service):
            begun = time.monotonic()
            with pytest.raises(StoreError, match="permission denied"):
                open_store(service.url("folder")).write("file", b"1")
            assert time.monotonic() - begun < retry.RETRY_SECONDS / 2


@pytest.mark.parametrize("url", ["s3://", "gs:///folder", "az://", "azure://account"])
def test_a_url_without_a_bucket_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected the name of a (bucket|container)"):
        open_bucket(url)


def test_azure_needs_an_account_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", ACCOUNT_KEY)
    with pytest.raises(ConfigError, match="az://container/folder: AZURE_ACCOUNT_NAME is not set"):
        open_bucket("az://container/folder")
    theirs = open_bucket("azure://theirs/container/folder")
    assert "theirs.blob.core.windows.net/container" in theirs._client.url
    monkeypatch.setenv("AZURE_ACCOUNT_NAME", "ours")
    ours = open_bucket("az://container/folder")
    assert "ours.blob.core.windows.net/container" in ours._client.url


def test_a_missing_profile_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"s3://name/folder: .*nobody"):
        open_bucket("s3://name/folder")


def test_credentials_are_read_from_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = theirs\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    assert open_bucket("s3://name/folder")._client._get_credentials().access_key == "theirs"


def test_googles_keys_for_s3_are_used_as_by_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCS_KEY", "key")
    monkeypatch.setenv("GCS_SECRET", "secret")
    store = open_bucket("gs://name/folder")
    assert isinstance(store, S3)
    assert store._client.meta.endpoint_url == "https://storage.googleapis.com"
    assert store._client._get_credentials().access_key == "key"


def test_the_requester_pays_if_streamings_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "other, name")
    store = open_bucket("s3://name/folder")
    sent: list[dict[str, object]] = []

    def head_object(**request: object) -> dict[str, object]:
        sent.append(request)
        return {"ContentLength": 1, "ETag": "x"}

    monkeypatch.setattr(store._client, "head_object", head_object)
    store.size("file")
    assert sent == [{"Bucket": "name", "Key": "folder/file", "RequestPayer": "requester"}]

"""An image's bytes: from all places, within bounds, and with the same error message each time."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path
from typing import Any

import pytest

from support.served import Server, served  # noqa: F401 - a fixture
from unitoken.codec.conversations import ItemError
from unitoken.storage import retry, web
from unitoken.storage.store import MissingError, StoreError
from unitoken.tokenize.sources import pictures
from unitoken.tokenize.sources.pictures import PictureReader

ROOM = 1000


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)


def fetch(
    source: str | bytes,
    base: str = ".",
    allow_http: bool = True,
    allow_private: bool = True,
    seconds: float = 5,
    room: int = ROOM,
) -> bytes:
    return PictureReader(allow_http, allow_private, seconds).read(base, source, room)


def reason(source: str | bytes, **settings: Any) -> str:
    with pytest.raises(ItemError) as error:
        fetch(source, **settings)
    return str(error.value)


# --- files and the item itself ------------------------------------------------------------------------------


def test_relative_paths_start_at_the_folder_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"abc")
    assert fetch("a.png", str(tmp_path)) == fetch(str(tmp_path / "a.png"), "/elsewhere") == b"abc"


def test_bytes_and_base64_are_taken_as_they_are() -> None:
    text = base64.b64encode(b"abc").decode()
    assert (
        fetch(b"abc")
        == fetch(f"data:image/png;base64,{text}")
        == fetch(f"DATA:image;BASE64,{text[:2]}\n{text[2:]}")
        == b"abc"
    )


@pytest.mark.parametrize(
    "source",
    ["data:image/png;base64,a", "data:image/png;base64,%%%%", "data:image/png,abc", "data:", "data:,"],
)
def test_invalid_base64_is_refused(source: str) -> None:
    assert reason(source).startswith("bad base64: data:")


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would never end
    for name in ("none.png", "folder.png", "pipe.png", "a.png/b.png", "zero\0byte.png"):
        assert reason(name, base=str(tmp_path)).startswith("no such image: ")
    assert reason("x" * 5000, base=str(tmp_path)).endswith("...: File name too long")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "a.png").write_bytes(b"abc")
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert reason("a.png", base=str(tmp_path)) == "image not reachable: a.png: Permission denied"


def test_images_are_limited_in_bytes_before_they_are_read(tmp_path: Path, served: Server) -> None:  # noqa: F811
    (tmp_path / "a.png").write_bytes(b"x" * 1001)
    served.files["/a.png"] = b"x" * 1001

    def endless(handler: Any, count: int) -> None:
        handler.answer(200, b"x" * 2000, {"Transfer-Encoding": "identity", "Content-Length": ""})

    served.files["/endless.png"] = endless
    data = "data:image;base64," + base64.b64encode(b"x" * 1001).decode()
    for source in (
        str(tmp_path / "a.png"),
        b"x" * 1001,
        data,
        data * 10,
        f"{served.url}/a.png",
        f"{served.url}/endless.png",
    ):
        assert reason(source).startswith("images too large: ")
        assert reason(source).endswith(f": 1000 bytes are left of {pictures.MAX_ITEM_BYTES} for an item")


# --- object stores ------------------------------------------------------------------------------------------


class Store:
    def read_range(self, name: str, start: int, end: int) -> bytes:
        if name == "none.png":
            raise MissingError("not there")
        if name == "secret.png":
            raise StoreError("s3://bucket/secret.png: permission denied")
        if name == "down.png":
            raise StoreError("request 0x7f1234 failed after 121.3 s")
        return (f"{name} " * 1000).encode()[start:end] if name == "large.png" else name.encode()


def test_images_come_from_object_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(pictures, "open_store", lambda url: opened.append(url) or Store())  # type: ignore[func-returns-value]
    assert fetch("images/a.png", "s3://bucket/data") == b"data/images/a.png"
    assert fetch("azure://account/container/x/a.png") == b"x/a.png"
    assert opened == ["s3://bucket", "azure://account/container"]  # one client per bucket, not per folder
    assert reason("none.png", base="s3://bucket") == "no such image: none.png"
    assert (
        reason("secret.png", base="s3://bucket")
        == "image not reachable: s3://bucket/secret.png: permission denied"
    )
    assert (
        reason("down.png", base="s3://bucket")
        == "image not reachable: s3://bucket/down.png: the store does not answer"
    )
    assert reason("large.png", base="s3://bucket").startswith("images too large: large.png: ")


@pytest.mark.parametrize("source", ["file:///etc/passwd", "ftp://host/a.png", "gopher://host/a.png"])
def test_other_schemes_are_not_allowed(source: str) -> None:
    assert reason(source).startswith("image not allowed: ")


# --- the web ------------------------------------------------------------------------------------------------


def test_images_come_from_the_web_where_the_settings_allow_it(served: Server) -> None:  # noqa: F811
    served.files["/x/a.png"] = b"abc"
    assert fetch(f"{served.url}/x/a.png") == fetch("a.png", f"{served.url}/x") == b"abc"
    served.asked.clear()
    assert reason(f"{served.url}/x/a.png", allow_http=False).startswith(
        f"image not allowed: {served.url}/x/a.png: allow_http"
    )
    assert not served.asked


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, "no such image: {}"),
        (410, "no such image: {}"),
        (403, "image not reachable: {}: permission denied"),
        (418, "image not reachable: {}: HTTP 418"),
    ],
)
def test_a_permanent_failure_is_not_retried(served: Server, status: int, expected: str) -> None:  # noqa: F811
    served.files["/a.png"] = lambda handler, count: handler.answer(status, b"<html>")
    assert reason(f"{served.url}/a.png") == expected.format(f"{served.url}/a.png")
    assert served.asked == ["/a.png"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transient_failure_is_retried(served: Server, status: int) -> None:  # noqa: F811
    served.files["/a.png"] = lambda handler, count: handler.answer(200 if count == 3 else status, b"abc")
    assert fetch(f"{served.url}/a.png") == b"abc"
    assert len(served.asked) == 3


@pytest.mark.usefixtures("quick")
def test_an_answer_that_breaks_off_is_retried(served: Server) -> None:  # noqa: F811
    served.files["/a.png"] = lambda handler, count: handler.answer(
        200, b"abc" if count == 2 else b"a", {"Content-Length": "3"}
    )
    assert fetch(f"{served.url}/a.png") == b"abc"


@pytest.mark.usefixtures("quick")
def test_all_attempts_together_keep_to_the_timeout(served: Server) -> None:  # noqa: F811
    """For a server that is down, one that sends nothing, and one that sends a byte now and then."""

    def silent(handler: Any, count: int) -> None:
        time.sleep(1)

    def dripping(handler: Any, count: int) -> None:
        handler.answer(200, b"", {"Content-Length": "1000000"})
        for _ in range(100):
            time.sleep(0.02)
            handler.wfile.write(b"x")

    served.files["/silent.png"], served.files["/dripping.png"] = silent, dripping
    served.files["/down.png"] = lambda handler, count: handler.answer(503, b"")
    for name, words in (("silent", "timeout"), ("dripping", "timeout"), ("down", "HTTP 503")):
        url = f"{served.url}/{name}.png"
        assert reason(url, seconds=0.3, room=1 << 30) == f"image not reachable: {url}: {words}"


@pytest.mark.usefixtures("quick")
def test_a_missing_server_gives_the_same_message_each_time() -> None:
    words = "no connection, or one that broke off"
    assert (
        reason("http://127.0.0.1:9/a.png", seconds=0.1)
        == f"image not reachable: http://127.0.0.1:9/a.png: {words}"
    )


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "/a.png"])
def test_redirects_lead_to_the_web_only_and_end(served: Server, target: str) -> None:  # noqa: F811
    served.files["/a.png"] = lambda handler, count: handler.answer(302, b"", {"Location": target})
    assert reason(f"{served.url}/a.png").startswith(f"image not reachable: {served.url}/a.png: ")
    assert len(served.asked) <= 6


def test_a_redirect_is_followed(served: Server) -> None:  # noqa: F811
    served.files["/a.png"] = lambda handler, count: handler.answer(302, b"", {"Location": "/b.png"})
    served.files["/b.png"] = b"abc"
    assert fetch(f"{served.url}/a.png") == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[",
        "http://host:99999999/",
        "http://" + "a" * 70 + ".x/",
        "http://\u2028/",
        "http://*/",
    ],
)
@pytest.mark.usefixtures("quick")
def test_an_invalid_url_is_a_reject(url: str) -> None:
    assert reason(url, seconds=0.1).startswith("image not reachable: ")


def test_a_source_of_a_server_without_ranges_is_refused(served: Server) -> None:  # noqa: F811
    served.files["/i.json"] = lambda handler, count: handler.answer(200, b"[1]")
    with pytest.raises(StoreError, match="sends no parts of files"):
        web.Web().size(f"{served.url}/i.json")

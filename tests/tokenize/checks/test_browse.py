"""A server that pages through a dataset, asked by real requests."""

import http.client
import io
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support.tokenizing import run_here, settings, some_items, write_items
from unitoken.tokenize.__main__ import app
from unitoken.tokenize.checks.browse import DatasetPages, Server, make_server
from unitoken.tokenize.merge import merge

HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def dataset(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browse")
    items = some_items(folder, 14)
    items[0]["id"] = HOSTILE
    run_here(settings(vqgan), write_items(folder, items), folder / "data")
    merge(str(folder / "data"))
    return folder / "data"


@pytest.fixture(scope="module")
def server(dataset: Path, vqgan: Path) -> Iterator[Server]:
    with DatasetPages(str(dataset), settings(vqgan), 5) as pages, make_server(pages, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server, target: str, method: str = "GET", host: str | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, target, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def page(server: Server, target: str) -> str:
    response, content = ask(server, target)
    assert response.status == 200, content
    return content.decode()


def ids(text: str) -> list[str]:
    return re.findall(r'data-id="(.*?)"', text)


def test_pages_lead_through_all_samples(server: Server) -> None:
    first, last = page(server, "/"), page(server, "/?page=3")
    assert (len(ids(first)), len(ids(last))) == (5, 2)
    assert "1 to 5 of 12" in first
    assert 'href="/?page=2"' in first
    assert "page 3 of 3" in last
    assert ids(page(server, "/?page=99")) == ids(last)


def test_filters_are_applied_to_the_whole_dataset(server: Server) -> None:
    drawn = page(server, "/?kind=generation&id=draw")
    assert ids(drawn) == ["draw-2", "draw-10"]
    assert "1 to 2 of 2 (12 in all)" in drawn
    assert 'value="generation" checked' in drawn
    assert "No sample passes" in page(server, "/?from=1000")
    assert 'href="/?kind=generation&amp;kind=text&amp;from=1&amp;page=2"' in page(
        server, "/?kind=generation&kind=text&from=1"
    )


def test_a_picture_is_decoded_when_it_is_asked_for(server: Server, dataset: Path) -> None:
    [target] = re.findall(r'src="(/picture/\d+-0)"', page(server, "/?id=draw-2"))
    response, content = ask(server, target)
    assert (response.status, response.headers["Content-Type"]) == (200, "image/png")
    shown = np.asarray(Image.open(io.BytesIO(content)))
    assert (shown.shape[0], shown.shape[2]) == (16, 4)
    for missing in ("/picture/0-0", "/picture/2-9", "/picture/999-0"):  # sample 0 has none
        assert ask(server, missing)[0].status == 404


def test_the_whole_dataset_is_shown_in_figures(server: Server) -> None:
    figures = page(server, "/figures")
    assert "<b>12</b><span>samples</span>" in figures
    assert "of the 64 codes occur" in figures
    assert "<td>no conversations</td>" in figures


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", ""]
)
def test_a_request_for_another_host_is_refused(server: Server, host: str) -> None:
    response, content = ask(server, "/", host=host)
    assert response.status == 403
    assert b"sample" not in content
    assert ask(server, "/", host="localhost:9000")[0].status == 200  # forwarded by ssh to another port


def test_two_hosts_or_none_are_refused(server: Server) -> None:
    for lines in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n" + lines + b"\r\n")
            assert connection.makefile("rb").readline().split()[1] == b"403"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_only_get_is_answered(server: Server, method: str) -> None:
    assert ask(server, "/", method=method)[0].status == 501


@pytest.mark.parametrize(
    "target",
    [
        "/manifest.json",
        "/../data/manifest.json",
        "/picture/..%2f-0",
        "//etc/passwd",
        "/picture/1-0.png",
        "/x?page=1",
    ],
)
def test_no_path_of_a_request_is_opened(server: Server, target: str) -> None:
    response, content = ask(server, target)
    assert response.status == 404
    assert b"there is no such page" in content


@pytest.mark.parametrize("query", ["page=-1", "kind=x", "from=1e9", "&".join(["id=a"] * 30), "to=%3Cb%3E"])
def test_a_bad_query_is_one_line_on_a_page(server: Server, query: str) -> None:
    response, content = ask(server, f"/?{query}")
    assert response.status == 400
    assert b"<b>" not in content


def test_nothing_from_data_or_request_becomes_markup(server: Server) -> None:
    for target in ("/", "/?id=%22%3E%3Cscript%3Ealert(1)%3C/script%3E"):
        text = page(server, target)
        assert "<script" not in text
        assert "&quot;&gt;&lt;script&gt;" in text
    response, _ = ask(server, "/")
    headers = {name: response.headers[name] for name in ("X-Frame-Options", "X-Content-Type-Options")}
    assert headers == {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff"}
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_other_machines_cannot_reach_it(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("options", [["--port", "70000"], ["--out", "page"]])
def test_options_that_do_not_fit_are_refused(dataset: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["preview", str(dataset), "--serve", *options])
    assert result.exit_code == 2


def test_a_port_in_use_is_one_line(server: Server, dataset: Path) -> None:
    port = str(server.server_port)
    result = CliRunner().invoke(app, ["preview", str(dataset), "--serve", "--port", port])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"--port {port}: Address already in use; choose another port" in result.stderr

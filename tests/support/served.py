"""A web server inside the test's process, which can also misbehave."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`: their content by path, or a function (handler, how often the path was requested)."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes | Callable[[Any, int], None]] = {}
        self.asked: list[str] = []  # the paths of all requests

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients that disconnect are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        content = self.server.files.get(path)
        if callable(content):
            return content(self, self.server.asked.count(path))
        if content is None:
            return self.answer(404, b"")
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not part:
            return self.answer(200, content)
        start, last = map(int, part.groups())
        headers = {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
        return self.answer(206, content[start : last + 1], headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

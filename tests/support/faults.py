"""A proxy in front of an object store that behaves like a bad network.

It delays, cuts or corrupts answers, gives wrong ones, or none at all.

with faulty(service, rate=0.1) as faults:
    ... StreamConfig(remote=service.url("data"), endpoint=faults.address)
    assert faults.counts["cut"]
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from support.services import Service

KINDS = ("delay", "cut", "corrupt", "500", "503", "404", "reset")


@dataclass
class Faults:
    port: int
    rate: float  # share of the requests for shards that fail
    random: random.Random = field(default_factory=lambda: random.Random(0))
    lost: set[str] = field(default_factory=set)  # names whose ends match are never found
    silent: threading.Event = field(default_factory=threading.Event)  # while set, no request is answered
    over: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    address: str = ""

    def draw(self, path: str) -> str:
        """Decide what happens to a request, and count it."""
        if any(path.endswith(name) for name in self.lost):
            return "lost"
        if not path.endswith(".mds"):
            self.counts["others"] += 1
            return "passed"
        kind = self.random.choice(KINDS) if self.random.random() < self.rate else "passed"
        self.counts[kind] += 1
        return kind


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults

    def do_GET(self) -> None:
        kind = self.faults.draw(self.path.partition("?")[0])
        if self.faults.silent.is_set():
            self.faults.over.wait(60)
            kind = "reset"
        if kind == "delay":
            time.sleep(self.faults.random.uniform(0.02, 0.2))
        if kind == "reset":
            self.close_connection = True
            return
        if kind in ("404", "500", "503", "lost"):
            self.send_response(404 if kind == "lost" else int(kind))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.faults.port, timeout=30)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # Host too, since it is signed
            upstream.putheader(name, value)
        upstream.endheaders()
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        if kind == "corrupt" and body:
            place = self.faults.random.randrange(len(body))
            body = body[:place] + bytes([body[place] ^ 0x55]) + body[place + 1 :]
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        self.close_connection = kind == "cut"

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: clients that disconnect in the middle are part of the tests."""


@contextlib.contextmanager
def faulty(service: Service, rate: float) -> Iterator[Faults]:
    """Run the proxy in a thread of this process."""
    faults = Faults(service.port, rate)
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faults": faults})) as server:
        faults.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield faults
        finally:
            faults.over.set()
            server.shutdown()
            thread.join()

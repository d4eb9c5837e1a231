"""`unitoken chat`: serves the page on this machine, and on no other.

gradio serves files and takes paths from a page; several of its routes fetch URLs, or read files that no page
of ours needs. So requests are checked before gradio sees them: which host they are for and which page they
come from, that their route is one that the page uses, and that every path in them is in the page's folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from unitoken.common.cli import report
from unitoken.common.errors import ConfigError
from unitoken.train.chat.talk import LARGEST_PICTURE, PageAbout
from unitoken.train.generation.loaded_model import FoundModel, LoadedModel

if TYPE_CHECKING:  # it imports torch
    from unitoken.train.chat.speaker import Speaker

HOST = "127.0.0.1"
OWN_NAMES = ("127.0.0.1", "localhost")
ROUTES = {
    "GET": r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[^?]*"
    r"|/gradio_api/(info|app_id|startup-events|upload_progress|queue/data|heartbeat/[A-Za-z0-9]+|file=.*)",
    "HEAD": r"/",
    "POST": r"/gradio_api/(upload|queue/join|cancel|reset)/?",
}
"""What the page asks for. All else that gradio offers is refused."""
LARGEST_MESSAGE = 4 << 20
"""Bytes of a question with its settings."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class OnlyThisPage:
    """ASGI middleware that answers what is not from the page itself with 403.

    Args:
        app: gradio's.
        folder: the only one whose files may be named.
    """

    def __init__(self, app: Any, folder: Path) -> None:
        self._app, self._folder = app, folder.resolve()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check a request, and hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["method"] == "POST" and not _is_upload(scope):
            body = await _read(receive, LARGEST_MESSAGE)
            refusal = self._refusal_of_message(body)
            receive = _replay(body, receive)
        if refusal is not None:
            await _refuse(send, refusal)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Any) -> str | None:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = urlsplit(f"//{headers.get('host', '')}").hostname
        if host not in OWN_NAMES:
            return f"this page is at {HOST} alone"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers["host"]:
            return "asked by another page"
        path = scope["path"]
        if path != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "asked by another page"
        if re.fullmatch(ROUTES.get(scope["method"], ""), path) is None:
            return "not a part of this page"
        _, named, file = path.partition("/gradio_api/file=")
        if named and not self._is_inside(file):
            return "not a picture of this page"
        return None

    def _refusal_of_message(self, body: bytes | None) -> str | None:
        try:
            message = json.loads(body) if body is not None else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            return f"expected JSON of at most {LARGEST_MESSAGE} bytes"
        if not all(self._is_inside(path) for path in _paths(message)):
            return "not a picture of this page"
        return None

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, str) or "\0" in path or "://" in path:
            return False
        return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._folder)


def _is_upload(scope: Any) -> bool:
    return str(scope["path"]).startswith("/gradio_api/upload")


def _paths(message: object) -> Iterator[object]:
    """Yield every value under a key `path`, which gradio takes for a file's."""
    if isinstance(message, dict):
        for key, value in message.items():
            if key == "path":
                yield value
            yield from _paths(value)
    elif isinstance(message, list):
        for value in message:
            yield from _paths(value)


async def _read(receive: Any, limit: int) -> bytes | None:
    """Read the body of a request; None if it is larger than the limit, or the other side is gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes | None, receive: Any) -> Any:
    """Return a `receive` that gives a body that was read before, and then goes on."""
    bodies = [] if body is None else [body]

    async def replay() -> Any:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Any, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def check_gradio() -> None:
    """Raise ConfigError if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("chat needs gradio: pip install 'unitoken-streaming[chat]'")


@contextlib.contextmanager
def gradio_folder() -> Iterator[Path]:
    """Yield the one folder that gradio reads and writes, and let no setting of other pages reach ours.

    It has to be set before gradio is imported.
    """
    with tempfile.TemporaryDirectory(prefix="chat-") as folder:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(Path(folder) / "examples")
        yield Path(folder)


def build_app(speaker: Speaker, about: PageAbout, folder: Path) -> Any:
    """Return the page as an ASGI application.

    Args:
        speaker: the model.
        about: what the page says about it.
        folder: of `gradio_folder`.
    """
    warnings.filterwarnings("ignore", module="gradio")  # its deprecations are not the user's
    import fastapi
    import gradio

    from unitoken.train.chat.page import STYLE, build_page, system_theme
    from unitoken.train.chat.sessions import Sessions

    blocks = build_page(Sessions(speaker, folder), about)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        path="/",
        server_name=HOST,
        allowed_paths=[],
        footer_links=[],
        max_file_size=LARGEST_PICTURE,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=system_theme(),
        css=STYLE,
    )
    # As `launch` sets them: without, gradio 6 does not check the paths that a page sends.
    blocks.has_launched = blocks.is_running = True
    return OnlyThisPage(app, folder)


def listen(port: int) -> socket.socket:
    """Open a port on this machine; 0 is any free one. Raises ConfigError."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise ConfigError(
            f"--port {port}: {error.strerror or error}: give another, or 0 for any that is free"
        ) from None


@contextlib.contextmanager
def running(app: Any, listener: socket.socket) -> Iterator[threading.Thread]:
    """Serve an application while the block runs; yield the thread that does."""
    import uvicorn

    config = uvicorn.Config(app, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = server.force_exit = True  # pages keep connections open for ever
        thread.join(2)


def serve(found: FoundModel, name: str, guidance: float, port: int) -> None:
    """Load a model and serve the page until a signal comes.

    Args:
        found: the model.
        name: of it, for the page.
        guidance: the default.
        port: on this machine; 0 is any free one.

    Raises:
        ConfigError: gradio is missing, the port is taken, or tokenizers and model do not fit.
    """
    check_gradio()
    listener = listen(port)
    from unitoken.train.chat.speaker import Speaker

    trained = found.config.data.null_prompt_fraction > 0
    about = PageAbout(name, found.sizes, guidance, trained, found.config.data.packed_length)
    model = LoadedModel(found)
    model.load()
    with gradio_folder() as folder:
        app = build_app(Speaker(model), about, folder)
        with running(app, listener) as thread:
            report(f"http://{HOST}:{listener.getsockname()[1]}/  (for this machine alone; Ctrl-C ends it)")
            thread.join()

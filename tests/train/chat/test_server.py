"""The page is for this machine alone, and no file and no address of anywhere else is read through it."""

import contextlib
import http.client
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from support.paths import ROOT, TESTS
from support.talking import write_talking_run
from unitoken.common.errors import ConfigError
from unitoken.train.chat import server
from unitoken.train.chat.server import check_gradio, listen

pytestmark = pytest.mark.filterwarnings("ignore")

SECRET = "the secret of another folder"


class Answer(NamedTuple):
    """Of the server."""

    status: int
    headers: Mapping[str, str]
    text: str


class Client(NamedTuple):
    """Sends paths as they are, where other clients tidy them up."""

    port: int
    folder: Path

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.putrequest(method, path, skip_host="host" in named)
            for name, value in {**named, "content-length": str(len(body or b""))}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(
                response.status, dict(response.getheaders()), response.read().decode(errors="replace")
            )

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, None, **headers)

    def post(self, path: str, message: object, **headers: str) -> Answer:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        return self.send("POST", path, body, **{"content_type": "application/json", **headers})

    def upload(self, content: bytes) -> Answer:
        head = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + content + b"\r\n--x--\r\n"
        return self.post("/gradio_api/upload", body, content_type="multipart/form-data; boundary=x")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_run(tmp_path_factory.mktemp("served"))


@contextlib.contextmanager
def served(run: Path, *options: str) -> Iterator[Client]:
    # gradio takes settings from the environment
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "GRADIO_ALLOWED_PATHS": "/",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(TESTS / "support/chat_program.py"), str(run), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=run) as process:
        try:
            assert process.stdout is not None
            where = json.loads(process.stdout.readline())
            yield Client(where["port"], Path(where["folder"]))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Client]:
    with served(run) as client:
        yield client


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_text(SECRET)
    return tmp_path / "secret.png"


def ask(client: Client, files: list[dict[str, Any]], **headers: str) -> Answer:
    """Send a question with files, as the page does."""
    about = json.loads(client.get("/config").text)
    number = next(
        dependency["id"] for dependency in about["dependencies"] if dependency["queue"] is not False
    )
    settings = ["text", "as in the data", 1, 10, 2000, 1, 0, 5]
    body = {
        "data": [{"text": "x", "files": files}, *settings],
        "fn_index": number,
        "session_hash": "page1",
        "event_data": None,
        "trigger_id": None,
    }
    return client.post("/gradio_api/queue/join", body, **headers)


def picture_at(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "url": path, "orig_name": "a.png"}


def events(client: Client) -> list[dict[str, Any]]:
    """What the page hears until its question is answered."""
    lines = client.get("/gradio_api/queue/data?session_hash=page1").text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def copies(folder: Path) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and SECRET in path.read_text(errors="ignore")
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "page.example"},
        {"host": "127.0.0.1.page.example:7860"},
        {"host": "localhost@page.example"},
        {"host": ""},
        {"origin": "http://page.example"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": "null"},
    ],
)
def test_other_hosts_and_pages_are_refused(client: Client, headers: dict[str, str]) -> None:
    assert client.get("/config", **headers).status == 403
    assert ask(client, [], **headers).status == 403


def test_another_page_may_link_to_this_and_no_more(client: Client) -> None:
    headers = {"sec_fetch_site": "cross-site"}
    assert client.get("/", **headers).status == 200
    assert client.get("/config", **headers).status == 403
    assert ask(client, [], **headers).status == 403


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/startup-events"]
)
def test_the_page_itself_is_served(client: Client, path: str) -> None:
    response = client.get(path, host="localhost:1234")
    assert response.status == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]


def test_the_name_of_a_run_is_no_html(client: Client) -> None:
    assert "<b>runs</b>" not in client.get("/").text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://pictures.example/a.png",
        "/gradio_api/file=http://pictures.example/a.png",
        "/gradio_api/deep_link?session_hash=page1",
        "/gradio_api/token",
        "/monitoring",
        "/gradio_api/vibe-code/",
        "/docs",
    ],
)
def test_what_the_page_does_not_need_is_refused(client: Client, path: str) -> None:
    assert client.get(path).status == 403


@pytest.mark.parametrize("path", ["component_server", "run/predict", "api/predict", "call/ask", "vibe-edit"])
def test_no_other_route_takes_messages(client: Client, path: str) -> None:
    assert client.post(f"/gradio_api/{path}", {"data": []}).status == 403


@pytest.mark.parametrize("form", ["{}", "/../..{}", "//{}", "{folder}/../../../../../..{}"])
def test_no_file_of_another_folder_is_served(client: Client, secret: Path, form: str) -> None:
    path = form.format(secret, folder=client.folder)
    response = client.get(f"/gradio_api/file={path}")
    assert response.status == 403
    assert SECRET not in response.text
    inside = client.folder / "inside.png"
    inside.write_bytes(b"\x89PNG")
    assert client.get(f"/gradio_api/file={inside}").status == 200


def test_a_link_in_the_folder_leads_nowhere(client: Client, secret: Path) -> None:
    link = client.folder / "link.png"
    link.symlink_to(secret)
    assert client.get(f"/gradio_api/file={link}").status == 403
    link.unlink()


@pytest.mark.parametrize("form", ["{}", "file://{}", "http://pictures.example{}", "./{}", "{folder}/..{}"])
def test_a_question_can_not_name_files_elsewhere(client: Client, secret: Path, form: str) -> None:
    path = form.format(secret, folder=client.folder)
    response = ask(client, [picture_at(path)])
    assert response.status == 403
    assert not copies(client.folder)


def test_gradio_itself_checks_paths(run: Path, secret: Path) -> None:
    """Mounted in another application it does not, unless it is told that it was launched."""
    with served(run, "unguarded") as client:
        assert ask(client, [picture_at(str(secret))]).status == 200
        (done,) = [event for event in events(client) if event["msg"] == "process_completed"]
        assert not done["success"]
        assert not copies(client.folder)


def test_an_uploaded_picture_is_read(client: Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 0, 0)).save(buffer, "PNG")
    uploaded = json.loads(client.upload(buffer.getvalue()).text)
    assert ask(client, [picture_at(uploaded[0])]).status == 200
    heard = events(client)
    assert any(event["msg"] == "process_completed" and event["success"] for event in heard), heard


def test_messages_are_limited_and_json(client: Client) -> None:
    path = "/gradio_api/queue/join"
    assert client.post(path, [1]).status == 403
    assert client.post(path, b"{").status == 403
    assert client.post(path, {"a": "x" * server.LARGEST_MESSAGE}).status == 403


def test_an_upload_is_limited(client: Client) -> None:
    large = b"x" * (server.LARGEST_PICTURE + 1)
    assert client.upload(large).status == 413
    assert all(path.stat().st_size < 1 << 20 for path in client.folder.rglob("*") if path.is_file())


def test_a_taken_port_is_named() -> None:
    with listen(0) as taken, pytest.raises(ConfigError, match="give another, or 0 for any that is free"):
        listen(taken.getsockname()[1])


def test_without_gradio_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"pip install 'unitoken-streaming\[chat\]'"):
        check_gradio()


def test_errors_come_before_torch_and_gradio(tmp_path: Path) -> None:
    code = (
        "import sys, unitoken.train.__main__ as m, unitoken.train.chat.server\n"
        "sys.argv = ['x', 'chat', 'nowhere']\n"
        "try:\n    m.app()\nexcept SystemExit as end:\n"
        "    print(end.code, {'torch', 'gradio', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "2 set()\n", done.stdout
    assert "no such checkpoint" in done.stderr

"""What SECURITY.md says: secrets stay out of what is shown and stored, and items of strangers reach nothing private."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT, TESTS
from support.served import Server, served  # noqa: F401 - a fixture
from support.tokenizing import run_here, settings
from unitoken.codec.conversations import ItemError
from unitoken.common import files
from unitoken.common.errors import ConfigError
from unitoken.common.urls import without_secrets
from unitoken.storage.shard_cache import ShardError
from unitoken.storage.store import MissingError, StoreError
from unitoken.storage.web_session import PrivateAddressError, WebSession, is_public
from unitoken.tokenize.sources.pictures import PictureReader

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "::1",
]
PRIVATE += [
    "::",
    "255.255.255.255",
    "fe80::1%eth0",
    "fd00::1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "2002:a00:1::",
]


# --- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@host/cat.jpg?sig=secret: timeout", "https://host/cat.jpg: timeout"),
        (
            "image not reachable: HTTP://me:sec@ret@host:80/a?secret#secret",
            "image not reachable: HTTP://host:80/a",
        ),
        (
            "'https://host/a.jpg?X-Amz-Signature=secret', and \"s3://secret:secret@b/k\"",
            "'https://host/a.jpg', and \"s3://b/k\"",
        ),
        ("az://container/blob?sv=1&sig=secret", "az://container/blob"),
        ("https://token-secret@host", "https://host"),
        ("https://host#access_token=secret", "https://host"),
        ("s3://bucket/what?/part-?.tar", "s3://bucket/what?/part-?.tar"),  # a glob, a name
        ("no URL: a?b=c me@host", "no URL: a?b=c me@host"),
        ("https://host/a?secret=1 https://other/b?secret=2", "https://host/a https://other/b"),
    ],
)
def test_a_url_is_shown_without_user_password_and_query(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


@pytest.mark.parametrize("kind", [ConfigError, StoreError, MissingError, ItemError, ShardError])
def test_no_error_contains_a_secret_even_from_another_process(kind: Any) -> None:
    error = kind("https://me:secret@host/a.tar?sig=secret: not there")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "https://host/a.tar: not there"


def test_signed_urls_leave_no_trace_in_a_dataset(tmp_path: Path, served: Server, vqgan: Path) -> None:  # noqa: F811
    """As the input, as a picture that is not there, and as one that is no picture."""
    signed = "?X-Amz-Signature=secret"
    served.files["/no.png"] = b"secret bytes"
    turns = [{"from": "human", "value": "What? <|image|>"}, {"from": "gpt", "value": "This."}]
    names = ("/none.png", "/no.png")
    items = [
        {"conversations": turns, "image": served.url.replace("//", "//me:secret@") + name + signed}
        for name in names
    ]
    served.files["/items.json"] = json.dumps(items).encode()
    config = settings(vqgan, allow_http=True, allow_private=True)
    run_here(config, f"{served.url}/items.json{signed}", tmp_path / "out")
    stored = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert (
        len(
            [
                line
                for path, data in stored.items()
                if path.name == "rejects.jsonl"
                for line in data.splitlines()
            ]
        )
        == 2
    )
    assert not [path for path, data in stored.items() if b"secret" in data]


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "127.1",
        "2130706433",
        "0x7f.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0",
    ],
)
def test_a_private_host_is_refused_under_every_name(served: Server, host: str) -> None:  # noqa: F811
    served.files["/a.png"] = b"abc"
    with pytest.raises(ItemError, match=r"^image not allowed: .*allow_private=true"):
        PictureReader(True, False, 5.0).read(".", f"http://{host}:{served.server_port}/a.png", 1000)
    assert not served.asked


def test_a_redirect_to_a_private_host_is_refused(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The first host is taken for a public one."""
    from unitoken.storage import web_session

    monkeypatch.setattr(web_session, "is_public", lambda address: address != "127.0.0.2")
    served.files["/a.png"] = lambda handler, count: handler.answer(
        302, b"", {"Location": f"http://127.0.0.2:{served.server_port}/b.png"}
    )
    served.files["/b.png"] = b"private"
    with pytest.raises(ItemError, match=r"^image not allowed: "):
        PictureReader(True, False, 5.0).read(".", f"{served.url}/a.png", 1000)
    assert served.asked == ["/a.png"]


def test_a_name_that_changes_its_address_is_refused(
    served: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unitoken.storage import web_session

    monkeypatch.setattr(web_session, "_check_name", lambda host: None)
    with pytest.raises(PrivateAddressError):
        WebSession(public_only=True).get(f"{served.url}/a.png", timeout=5)
    assert not served.asked


def test_credentials_are_never_taken_from_netrc(
    served: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither at the first request nor behind a redirect, nor in place of a token; those in the URL are used."""
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen: list[str | None] = []

    def answer(handler: Any, count: int) -> None:
        seen.append(handler.headers.get("Authorization"))
        to_b = handler.path == "/a"
        handler.answer(
            302 if to_b else 200,
            b"",
            {"Location": f"http://localhost:{served.server_port}/b"} if to_b else {},
        )

    served.files["/a"] = served.files["/b"] = answer
    session = WebSession(public_only=False)
    session.get(f"{served.url}/a", timeout=5)
    session.get(f"{served.url}/b", headers={"Authorization": "Bearer token"}, timeout=5)
    session.get(served.url.replace("//", "//me:pass@") + "/a", timeout=5)
    assert seen == [None, None, "Bearer token", "Basic bWU6cGFzcw==", None]


# --- the scratch folder ---------------------------------------------------------------------------


def test_the_scratch_folder_belongs_to_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(files.getpass, "getuser", lambda: "me")
    path = tmp_path / "unitoken-me"
    assert files.scratch_folder() == files.scratch_folder() == path
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        files.scratch_folder()
    path.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="folder of your own"):
        files.scratch_folder()
    path.unlink()
    path.mkdir(mode=0o700)
    monkeypatch.setattr(files.os, "getuid", lambda: path.lstat().st_uid + 1)
    with pytest.raises(ConfigError, match="folder of your own"):
        files.scratch_folder()


# --- the page itself ------------------------------------------------------------------------------


def test_every_line_of_security_md_names_a_test_that_exists() -> None:
    lines = re.findall(r"^- .*(?:\n  .*)*", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", line)
        assert named, line
        for module, test in named:
            assert f"def {test}(" in (TESTS / module).read_text(encoding="utf-8"), line

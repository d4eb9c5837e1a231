"""The documentation as a site, served as a reader would."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support.browser import OpenPage
from support.paths import ROOT


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
@pytest.mark.parametrize("name", ["index", "how-it-works", "settings-stage", "quickstart"])
def test_a_page_fits_and_has_no_error(
    name: str, width: int, dark: bool, site: str, open_page: OpenPage
) -> None:
    opened = open_page(f"{site}/{name}.html", width=width, dark=dark)
    assert opened.overhang() == 0
    assert opened.page.locator("h1").is_visible()
    opened.save_screenshot(f"site-{name}-{width}")


def test_the_search_finds_a_key(site: str, open_page: OpenPage) -> None:
    page = open_page(f"{site}/index.html", width=1280).page
    page.locator("input.md-search__input").click()
    page.keyboard.type("packed_length")
    found = page.locator(".md-search-result__link").first
    found.wait_for()
    assert "html" in (found.get_attribute("href") or "")

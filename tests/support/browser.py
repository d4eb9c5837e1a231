"""Chromium for the tests of pages: one process per session, and a fresh context for every page.

    def test_my_page(open_page: OpenPage) -> None:               # a fixture of tests/pages/conftest.py
        opened = open_page(folder / "report.html", width=400, dark=True)   # or "http://127.0.0.1:..."
        opened.page.get_by_label("Kind").select_option("images")           # playwright's own Page
        assert opened.overhang() == 0
        opened.save_screenshot("report-narrow")

A test fails after its end if a page wrote an error to the console, raised one, or asked anything but this
machine for a file. SCREENSHOTS=docs/images keeps the screenshots; without it they are only made.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Request, sync_playwright

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
LARGEST_SCREENSHOT = 200_000  # bytes


def find_chromium() -> str:
    """Return the path of chromium: $CHROMIUM, or the one on PATH. Fails the test without one."""
    chromium = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    if chromium is None:
        pytest.fail("no chromium on PATH: install it, or name it with CHROMIUM=", pytrace=False)
    return chromium


@contextlib.contextmanager
def start_chromium() -> Iterator[Browser]:
    """Yield a running chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class OpenedPage:
    """A page, and what went wrong in it.

    Attributes:
        page: playwright's.
        problems: errors of the console and of scripts, and requests that leave this machine.
    """

    page: Page
    problems: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Collect problems from now on."""
        self.page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("request", self._note_request)

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _note_request(self, request: Request) -> None:
        if not stays_here(request.url):
            self._note(f"asked for {request.url}")

    def overhang(self) -> int:
        """Return by how many pixels the page is wider than the window: 0 if nothing scrolls sideways."""
        return int(
            self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        )

    def save_screenshot(self, name: str, *, full_page: bool = False) -> bytes:
        """Take a PNG, and keep it as `name`.png in the folder $SCREENSHOTS, if that is set.

        With more than 200 kB it is reduced to 256 colours, and must then be smaller.
        """
        picture = self.page.screenshot(full_page=full_page, animations="disabled")
        if len(picture) >= LARGEST_SCREENSHOT:
            picture = _with_fewer_colours(picture)
        assert len(picture) < LARGEST_SCREENSHOT, f"{name}: {len(picture)} bytes"
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(picture)
        return picture


def stays_here(url: str) -> bool:
    """Whether a URL names a file, data, or a server of this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or parts.hostname in ("127.0.0.1", "localhost")


def _with_fewer_colours(picture: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class OpenPage(Protocol):
    """Opens a file of this machine or a URL in a window of `width` x `height` pixels."""

    def __call__(
        self, where: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> OpenedPage: ...


@contextlib.contextmanager
def page_opener(browser: Browser) -> Iterator[OpenPage]:
    """Yield an `OpenPage`; at the end close its pages, and fail if one of them had problems."""
    opened: list[OpenedPage] = []

    def open_page(
        where: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> OpenedPage:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        opened.append(OpenedPage(context.new_page()))
        opened[-1].watch()
        opened[-1].page.goto(where.resolve().as_uri() if isinstance(where, Path) else where)
        return opened[-1]

    try:
        yield open_page
    finally:
        for each in opened:
            each.page.context.close()
    assert not _all_problems(opened), "\n".join(_all_problems(opened))


def _all_problems(opened: Sequence[OpenedPage]) -> list[str]:
    return [problem for each in opened for problem in each.problems]

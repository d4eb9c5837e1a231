"""The fixture notices what a page does wrong."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from support.browser import OpenPage, page_opener, stays_here


def page(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><title>a page</title>{body}", encoding="utf-8")
    return path


def test_a_page_has_its_width_and_colour_scheme(open_page: OpenPage, tmp_path: Path) -> None:
    narrow = open_page(page(tmp_path, "<p>text"), width=400, dark=True)
    assert narrow.page.evaluate("innerWidth") == 400
    assert narrow.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert narrow.overhang() == 0


def test_what_is_too_wide_is_measured(open_page: OpenPage, tmp_path: Path) -> None:
    body = "<style>* { margin: 0 }</style><div style='width: 450px'>wide</div>"
    assert open_page(page(tmp_path, body), width=400).overhang() == 50


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("console.error('odd')", "odd"),
        ("throw new Error('broken')", "broken"),
        ("new Image().src = 'http://pictures.invalid/a.png'", "asked for http://pictures.invalid/a.png"),
    ],
)
def test_a_problem_of_a_page_fails_the_test(
    chromium: Browser, tmp_path: Path, script: str, problem: str
) -> None:
    with pytest.raises(AssertionError, match=problem), page_opener(chromium) as open_page:
        open_page(page(tmp_path, f"<script>{script}</script>"))


def test_only_this_machine_is_here() -> None:
    assert stays_here("http://127.0.0.1:7860/x")
    assert stays_here("data:image/png;base64,")
    assert not stays_here("https://127.0.0.1.example.com/x")


def test_a_screenshot_is_kept_where_it_is_wanted(
    open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_page(page(tmp_path, "<p>text"))
    assert opened.save_screenshot("text").startswith(b"\x89PNG")
    assert not list(tmp_path.glob("**/*.png"))
    monkeypatch.setenv("SCREENSHOTS", str(tmp_path / "pictures"))
    opened.save_screenshot("text")
    assert (tmp_path / "pictures" / "text.png").stat().st_size < 200_000

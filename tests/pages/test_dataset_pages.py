"""The pages of a dataset and of a plan, in a browser."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Page, expect
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from demo import digits
from support.browser import OpenPage
from support.paths import ROOT
from support.tokenizing import run_here, turns, write_items
from unitoken.streaming_data.__main__ import app as mixtures
from unitoken.tokenize.checks.browse import DatasetPages, make_server
from unitoken.tokenize.checks.gallery import write_page
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.merge import merge

ASSETS = ROOT / "demo" / "assets"
DIGITS = 40
LOOKS = pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])


def settings() -> TokenizeConfig:
    vision = {"weights": str(ASSETS / "vqgan"), "batch_size": 16}
    fields = {"tokenizer": str(ASSETS / "tokenizer"), "vision": vision, "target_size": 16, "chunk_size": 30}
    return TokenizeConfig.model_validate(fields)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits that are read, digits that are drawn, text, and an item that is rejected."""
    folder = tmp_path_factory.mktemp("pages")
    images, targets = load_digits().images[:DIGITS], load_digits().target[:DIGITS]
    items: list[dict[str, object]] = [
        {"id": "<none>", "conversations": turns("<|image|>", "a"), "image": "no"}
    ]
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        word, name = digits.WORDS[target], f"{number:02d}.png"
        digits.picture(image).save(folder / name)
        question = digits.QUESTIONS[number % 3]
        items.append({"id": f"read-{number}", "conversations": turns(question, word), "image": name})
        request = digits.REQUESTS[number % 3].format(word)
        items.append({"id": f"draw-{number}", "conversations": turns(request, "<|image|>"), "image": name})
        items.append(
            {"id": f"text-{number}", "conversations": turns(f"It is a {word}. " * (number % 9 + 1), word)}
        )
    run_here(settings(), write_items(folder, items), folder / "digits")
    merge(str(folder / "digits"))
    return folder / "digits"


@pytest.fixture(scope="module")
def gallery(dataset: Path) -> Path:
    with contextlib.chdir(dataset.parent):  # the page is headed by the path as it was given
        write_page("digits", settings(), 60, Path("page"))
    return dataset.parent / "page" / "index.html"


@pytest.fixture(scope="module")
def served(dataset: Path) -> Iterator[str]:
    with DatasetPages(str(dataset), settings(), 10) as pages, make_server(pages, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def shown(page: Page) -> int:
    return page.locator("section.sample:visible").count()


@LOOKS
def test_the_preview_fits_its_window(open_page: OpenPage, gallery: Path, width: int, dark: bool) -> None:
    opened = open_page(gallery, width=width, dark=dark)
    assert opened.overhang() == 0
    assert opened.page.locator("svg[role=img]").count() == 4
    look = f"{width}{'-dark' if dark else ''}"
    opened.save_screenshot(f"preview-figures-{look}")
    opened.page.evaluate("document.querySelector('#samples').scrollIntoView()")
    first = opened.page.locator("section.sample img").first
    first.scroll_into_view_if_needed()
    expect(first).to_have_js_property("complete", True)
    assert first.evaluate("image => image.naturalWidth") > 32
    opened.save_screenshot(f"preview-samples-{look}")


def test_a_filter_hides_samples_and_stays_in_the_address(open_page: OpenPage, gallery: Path) -> None:
    page = open_page(gallery).page
    assert shown(page) == 60
    page.get_by_label("draws pictures").check()
    drawn = shown(page)
    assert 0 < drawn < 60
    expect(page.locator("output")).to_have_text(f"{drawn} of 60 shown")
    page.get_by_label("Part of the id").fill("DRAW-1")
    assert 0 < shown(page) < drawn
    assert "kind=generation" in page.url
    page.reload()
    assert page.get_by_label("draws pictures").is_checked()
    assert 0 < shown(page) < drawn
    page.get_by_label("Fewest tokens").fill("9999")
    expect(page.locator("output")).to_have_text("0 of 60 shown")


def test_a_thousand_samples_open_at_once(open_page: OpenPage, gallery: Path, tmp_path: Path) -> None:
    text = gallery.read_text()
    start, end = text.index('<section class="sample"'), text.rindex("</section>") + len("</section>")
    large = gallery.with_name("large.html")
    large.write_text(text[:start] + text[start:end] * 17 + text[end:])
    assert large.stat().st_size < 2_000_000
    page = open_page(large).page
    assert page.locator("section.sample").count() == 1020
    timing = "performance.getEntriesByType('navigation')[0].domInteractive"
    assert page.evaluate(timing) < 2000  # 200 on an idle machine
    loaded = "[...document.images].filter(image => image.complete && image.naturalWidth).length"
    assert page.evaluate(loaded) < 100


@LOOKS
def test_the_served_pages_fit_their_window(open_page: OpenPage, served: str, width: int, dark: bool) -> None:
    for path in ("", "figures"):
        opened = open_page(served + path, width=width, dark=dark)
        assert opened.overhang() == 0
        opened.save_screenshot(f"serve-{path or 'samples'}-{width}{'-dark' if dark else ''}")


def test_the_served_filter_leads_through_all_pages(open_page: OpenPage, served: str) -> None:
    page = open_page(served).page
    page.get_by_label("draws pictures").check()
    page.get_by_role("button", name="Show").click()
    expect(page.locator("output")).to_have_text("1 to 10 of 40 (120 in all)")
    seen = 0
    while True:
        seen += shown(page)
        expect(page.locator("section.sample img").first).to_have_js_property("complete", True)
        if page.get_by_role("link", name="Next").count() == 0:
            break
        page.get_by_role("link", name="Next").click()
    assert seen == 40
    page.get_by_role("link", name="Figures").click()
    expect(page.get_by_role("heading", name="Codes in use")).to_be_visible()


@pytest.fixture(scope="module")
def plan(dataset: Path) -> Path:
    streams = {
        kind: {"local": "digits", "kinds": [kind], "proportion": share}
        for kind, share in (("understanding", 0.5), ("generation", 0.3), ("text", 0.2))
    }
    data = {
        "streams": streams, "unit": "tokens", "epoch_tokens": 400_000, "packed_length": 256,
        "global_batch": 8, "batching_method": "random", "continuous": "none", "cache": "cache",
    }  # fmt: skip
    with contextlib.chdir(dataset.parent):
        Path("stage.yaml").write_text(yaml.safe_dump({"max_duration": "2ep", "data": data}))
        result = CliRunner().invoke(
            mixtures, ["plan", "stage.yaml", "--sweep-length", "--report", "plan.html"]
        )
    assert result.exit_code == 0, result.output
    return dataset.parent / "plan.html"


@LOOKS
def test_the_plan_fits_its_window(open_page: OpenPage, plan: Path, width: int, dark: bool) -> None:
    opened = open_page(plan, width=width, dark=dark)
    assert opened.overhang() == 0
    assert opened.page.locator("svg[role=img]").count() == 5
    opened.page.get_by_role("heading", name="By stream").evaluate("heading => heading.scrollIntoView()")
    opened.save_screenshot(f"plan-{width}{'-dark' if dark else ''}")

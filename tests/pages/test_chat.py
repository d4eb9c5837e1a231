"""`unitoken chat` in a browser: questions, answers, drawings, errors, and nothing from elsewhere.

    CHAT_RUN=demo/out/runs/stage2 SCREENSHOTS=docs/images .venv/bin/python -m pytest tests/pages/test_chat.py

after `make demo` makes the pictures of docs/ anew, with a model that draws more than noise.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from sklearn.datasets import load_digits

from demo.digits import picture
from support.browser import OpenedPage, OpenPage
from support.talking import write_talking_run

ANSWER_MS = 20_000
TRAINED = os.environ.get("CHAT_RUN")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_run(tmp_path_factory.mktemp("talking"), packed_length=6000)


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """The page of the command as users start it."""
    command = [str(Path(sys.executable).parent / "unitoken"), "chat", str(TRAINED or run), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()
            assert process.wait(20) == 143


def ask(page: Page, text: str) -> None:
    box = page.get_by_placeholder("Your question")
    box.fill(text)
    box.press("Enter")


def ask_for_long(page: Page) -> None:
    """Ask for a reply that takes seconds: the likeliest tokens of a new model go round in circles."""
    page.get_by_label("text only").check()
    page.get_by_label("Text from likeliest").fill("1")
    page.get_by_label("Most tokens").fill("5000")
    ask(page, "Tell me everything.")


def replies(page: Page) -> Locator:
    return page.get_by_test_id("bot")


def wait_until_idle(page: Page) -> None:
    expect(page.locator("button.submit-button")).to_be_visible(timeout=ANSWER_MS)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
def test_answers_and_drawings(
    open_page: OpenPage, address: str, width: int, dark: bool, tmp_path: Path
) -> None:
    opened = open_page(address, width=width, height=860, dark=dark)
    page = opened.page
    picture(load_digits().images[3]).save(tmp_path / "three.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "three.png")
    expect(page.locator(".thumbnail-item")).to_be_visible()
    page.get_by_label("text only").check()
    page.get_by_label("Most tokens").fill("20")
    ask(page, "Which digit do you see?")
    expect(replies(page)).to_have_count(1, timeout=ANSWER_MS)
    wait_until_idle(page)
    assert replies(page).inner_text().strip()
    page.get_by_label("one picture").check()
    ask(page, "Please draw the digit seven.")
    expect(page.locator("#chat .image-frame img")).to_have_count(2, timeout=ANSWER_MS)
    wait_until_idle(page)
    drawn = page.locator("#chat .image-frame img").last
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=drawn.element_handle())
    assert opened.overhang() == 0
    assert page.get_by_label("Download").first.is_visible()
    assert page.locator("button[aria-label=Share]:visible").count() == 0
    if dark == (width == 400):
        save(opened, f"chat-{width}-{'dark' if dark else 'light'}")


def save(opened: OpenedPage, name: str) -> None:
    if not TRAINED:
        return
    opened.page.evaluate("scrollTo(0, 0)")
    opened.page.mouse.move(0, 0)
    opened.save_screenshot(name)


def test_a_reply_is_text_and_asks_for_nothing(open_page: OpenPage, address: str) -> None:
    page = open_page(address).page
    page.get_by_label("text only").check()
    page.get_by_label("Most tokens").fill("5")
    forged = "<img src='http://pictures.invalid/a.png'> ![x](http://pictures.invalid/b.png) <b>no</b> $$x$$"
    ask(page, forged)
    expect(replies(page)).to_have_count(1, timeout=ANSWER_MS)
    assert page.get_by_test_id("user").inner_text() == forged
    assert page.locator("#chat b").count() == 0
    wait_until_idle(page)


def test_errors_are_one_line_and_keep_the_question(open_page: OpenPage, address: str) -> None:
    page = open_page(address).page
    remark = page.locator("#remark [role=alert]")
    ask(page, "What is it? <|image|>")
    expect(remark).to_have_text(re.compile(r"1 <\|image\|> in the text but 0 images"), timeout=ANSWER_MS)
    expect(page.get_by_placeholder("Your question")).to_have_value("What is it? <|image|>")
    ask(page, "long " * 7000)
    expect(remark).to_have_text(re.compile("exceed data.packed_length"), timeout=ANSWER_MS)
    assert remark.inner_text().count("\n") == 0
    assert "Traceback" not in page.content()
    expect(replies(page)).to_have_count(0)


def test_what_is_no_picture_is_refused(open_page: OpenPage, address: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no picture")
    page = open_page(address).page
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    expect(page.locator(".thumbnail-item")).to_be_visible()
    ask(page, "What is it?")
    expect(page.locator("#remark [role=alert]")).to_have_text(re.compile("^broken.png: "), timeout=ANSWER_MS)


def test_a_reply_can_be_stopped_and_forgotten(open_page: OpenPage, address: str) -> None:
    page = open_page(address).page
    ask_for_long(page)
    page.locator("button.stop-button").click(timeout=ANSWER_MS)
    expect(page.locator("#remark")).to_have_text(re.compile("Stopped"), timeout=ANSWER_MS)
    wait_until_idle(page)
    ask(page, "And more.")
    expect(replies(page)).to_have_count(2, timeout=ANSWER_MS)
    page.get_by_role("button", name="New conversation").click()
    wait_until_idle(page)
    expect(replies(page)).to_have_count(0)
    expect(page.locator("#remark")).to_have_text("")


def test_questions_of_two_pages_wait_for_each_other(open_page: OpenPage, address: str) -> None:
    first, second = open_page(address).page, open_page(address).page
    for page in (first, second):
        ask_for_long(page)
    expect(second.locator("#remark")).to_have_text(re.compile("Waiting"), timeout=ANSWER_MS)
    first.locator("button.stop-button").click()
    wait_until_idle(first)
    expect(replies(second)).not_to_have_text("…", timeout=ANSWER_MS)
    second.locator("button.stop-button").click()
    wait_until_idle(second)

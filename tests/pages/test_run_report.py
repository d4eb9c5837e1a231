"""The report of a long run in a browser."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.browser import OpenPage
from support.run_logs import write_run, write_samples
from unitoken.train.report.page import write_report

STEPS = 100_000


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run = write_run(folder / "stage2", steps=STEPS, lr=1e-4)
    for step in range(STEPS // 20, STEPS + 1, STEPS // 20):
        write_samples(run, step)
    write_report([("runs/stage2", run)], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_report_of_100000_steps_opens_at_once(
    width: int, dark: bool, report: Path, open_page: OpenPage
) -> None:
    begin = time.monotonic()
    opened = open_page(report, width=width, dark=dark)
    assert (
        time.monotonic() - begin < 20
    )  # two seconds on a quiet machine; ten times that is no page of points
    assert opened.overhang() == 0
    assert opened.page.locator("polyline").count() >= 6
    opened.save_screenshot("run-report-narrow" if dark else "run-report")
    settings = opened.page.locator("details")
    assert not settings.get_by_text("optimizer.lr").is_visible()
    settings.locator("summary").click()
    assert settings.get_by_text("optimizer.lr").is_visible()

"""The report of runs, from logs that were written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.run_logs import write_run, write_samples
from unitoken.common.errors import ConfigError
from unitoken.train.report.page import REPORT, report_page, write_report, write_run_report
from unitoken.train.report.run_log import read_run
from unitoken.train.run.log_files import read_starts


def test_a_run_s_report_needs_no_other_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lr=1e-4)
    for step in (100, 200):
        write_samples(run, step)
    page = report_page([read_run(run, "runs/a")])
    assert "<title>stage1</title>" in page
    assert {"Loss", "Evaluations", "Course", "Data", "Samples", "Starts", "Settings"} <= set(
        re.findall("<h2>(.*?)</h2>", page)
    )
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "Answer 200" in page
    assert "60.0%" in page  # of the tokens were drawings


def test_a_resumption_and_its_repeated_steps_are_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert [(start.step, start.reached, start.ranks) for start in read_starts(run)] == [
        (0, 0, 2),
        (120, 133, 4),
    ]
    page = report_page([read_run(run, "a")])
    assert "stopped after step 133, resumed at step 120" in page


def test_a_broken_start_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "starts.jsonl", "a") as file:
        file.write('{"step": 150, "reached": "many", "ranks": 4}\n{"step": 160')
    assert [start.step for start in read_starts(run)] == [0, 120]
    assert capsys.readouterr().err.count("left out") == 2


def test_several_runs_show_only_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, lr=lr, eps=1e-8) for name, lr in (("a", 1e-4), ("b", 3e-4))]
    page = report_page([read_run(run, run.name) for run in runs])
    settings = page[page.index("Settings that differ") :]
    assert "optimizer.lr" in settings
    assert "optimizer.eps" not in settings


def test_long_runs_have_short_reports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20_000)
    for step in range(100, 20_000, 200):
        write_samples(run, step)
    page = report_page([read_run(run, "a")])
    assert len(page) < 600_000
    assert page.count("<img") == 8
    assert "step 100" in page
    assert "step 19,900" in page


def test_repeated_and_broken_lines_count_once_and_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.5}',
        '{"step": 2, "loss": 2.0}',
        '{"step": 3, "lo',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    curve = read_run(run, "a").curves["loss"]
    assert (list(curve.steps), list(curve.values)) == ([1, 2], [3.0, 2.0])


def test_texts_of_logs_are_shown_and_never_run(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    run = write_run(tmp_path / "run", note=bad)
    write_samples(run, 100, prompt=bad)
    (run / "samples" / "step-00000100" / "drawings.txt").write_text(f"0.png\t{bad}\n../../../x.png\t{bad}2\n")
    lines = (run / "metrics.jsonl").read_text() + json.dumps({"step": 200, bad: {bad: 1.0}}) + "\n"
    (run / "metrics.jsonl").write_text(lines)
    page = report_page([read_run(run, bad)])
    assert "<script" not in page
    assert f"{bad}2".replace("<", "&lt;").replace(">", "&gt;") not in page, "a path out of the folder"


def test_a_broken_picture_is_noted_and_the_report_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_samples(run, 100)
    (run / "samples" / "step-00000100" / "0.png").write_bytes(b"no picture")
    assert "missing" in report_page([read_run(run, "a")])


def test_another_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path / "no", "no such folder"), (tmp_path, "no metrics.jsonl in it")):
        with pytest.raises(ConfigError, match=f"{problem}; name the folder of a run") as error:
            write_report([("a", folder)], tmp_path / "r.html")
        assert "\n" not in str(error.value)


def test_a_run_ends_well_without_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / REPORT).mkdir()  # so that it can not be written
    write_run_report(run)
    assert "report.html: not written" in capsys.readouterr().err

"""How the progress of a run is counted and shown."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import pytest

from support.tokenizing import settings, some_items, write_items
from unitoken.tokenize.executors.progress import (
    ItemProgressLines,
    ProgressCount,
    RunProgress,
    progress_of,
    show_progress,
)
from unitoken.tokenize.job import Round
from unitoken.tokenize.prepare import prepare

ITEMS = 24
CHUNKS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_items(folder, some_items(folder, ITEMS))


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(RunProgress(10, 4, 3, lambda: 1)) as bar:
        bar.show()
        bar.advance(3, 1)
        bar.show()
        bar.advance(3, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenize: 4/10 items, loading the models"
    assert lines[-1].startswith("tokenize: 10/10 items, ")
    assert lines[-1].endswith(" 1 rejected")
    assert len(lines) == 2  # the second came too soon


def test_chunks_are_counted_if_the_number_of_items_is_unknown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = iter([1, 3])
    with show_progress(RunProgress(None, 0, 3, lambda: next(done))) as bar:
        bar.show()
        bar.advance(70, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenize: 0 items, 1/3 chunks, loading the models"
    assert lines[-1].startswith("tokenize: 70 items, 3/3 chunks, ")


def test_the_bar_of_a_terminal_shows_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    for total in (10, None):
        with show_progress(RunProgress(total, 4, 3, lambda: 2)) as bar:
            bar.advance(5, 1)
            bar.show()
    shown = capsys.readouterr().err
    assert "9/10 items, " in shown
    assert "9 items, 2/3 chunks, " in shown
    assert "1 rejected" in shown


def test_80_columns_hold_all_texts_of_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(ProgressCount, "rate", 1071.3)
    monkeypatch.setenv("COLUMNS", "80")
    with show_progress(RunProgress(10_000_000, 0, 3, lambda: 2)) as bar:
        bar.advance(1_234_567, 12_345)
        bar.show()
    assert " 1,234,567/10,000,000 items, 1,071/s, 136.4 min left, 12,345 rejected" in capsys.readouterr().err


def test_a_retry_counts_only_the_items_that_it_tries(source: Path, vqgan: Path, tmp_path: Path) -> None:
    job = prepare(settings(vqgan, chunk_size=2), [str(source)], str(tmp_path / "out"))
    job = dataclasses.replace(job, work=dataclasses.replace(job.work, rounds=(Round(items=[(0, 1)]),)))
    assert progress_of(job, job.chunks()).items == 1


def test_the_rate_counts_the_first_seconds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items come in bursts: counted from the first burst on, the rate was 123/s instead of 0.6/s."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    count = ItemProgressLines(RunProgress(100, 50, 1, lambda: 0))
    assert count.rate == 0
    count.advance(10, 0)
    clock[0] = 2.0
    count.advance(10, 0)
    assert count.rate == 10
    assert "70/100 items, 10/s, 0.1 min left" in count.state()


def test_a_rank_counts_its_own_chunks(source: Path, vqgan: Path, tmp_path: Path) -> None:
    job = prepare(settings(vqgan, chunk_size=2), [str(source)], str(tmp_path / "out"))
    (tmp_path / "out" / "chunk-000003").mkdir()
    (tmp_path / "out" / "chunk-000003" / "index.json").touch()
    share = progress_of(job, job.chunks()[1::2])
    assert (share.items, share.done, share.chunks, share.count_done_chunks()) == (
        ITEMS // 2,
        2,
        CHUNKS // 2,
        1,
    )

"""Several processes: a killed run and a repeated one give the same bytes; a dead worker stops no other."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from support.processes import alive, children, wait_for
from support.tokenizing import TOKENIZER, content, run_here, settings, some_items, write_items
from unitoken.common.errors import ConfigError
from unitoken.storage.store import StoreError
from unitoken.tokenize.executors.local import Reporter, launch, run_worker
from unitoken.tokenize.merge import merge
from unitoken.tokenize.prepare import prepare

ITEMS = 24
CHUNKS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_items(folder, some_items(folder, ITEMS))


@pytest.fixture(scope="module")
def expected(source: Path, vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The dataset as one process makes it."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run_here(settings(vqgan, chunk_size=2), source, out)
    merge(str(out))
    return content(out)


def command(source: Path, vqgan: Path, out: Path, splits: int = 2) -> list[str]:
    run = [sys.executable, "-m", "unitoken.tokenize", "run", "--splits", str(splits)]
    files = ["--config", "yamls/tokenize/chameleon.yaml", "--in_filename", str(source), "--out_dir", str(out)]
    paths = [f"tokenizer={TOKENIZER}", f"vision.weights={vqgan}"]
    return [*run, *files, "--target_size", "16", *paths, "vision.batch_size=3", "chunk_size=2"]


def done(out: Path) -> int:
    return len(list(out.glob("chunk-*/index.json")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_run_killed_and_repeated_gives_the_same_bytes(
    source: Path, vqgan: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The parent is killed twice, and its workers end with it. Then the command runs to its end, twice."""
    out = tmp_path / "out"
    moment = random.Random(4)
    for chunks, splits in ((1, 3), (6, 2)):
        process = subprocess.Popen(
            command(source, vqgan, out, splits), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda chunks=chunks: done(out) >= chunks)  # type: ignore[misc]
        time.sleep(moment.uniform(0, 0.05))
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda workers=workers: not any(map(alive, workers)), seconds=10)  # type: ignore[misc]
        assert not (out / "manifest.json").exists()
    for _ in range(2):
        finish = subprocess.run(
            command(source, vqgan, out, splits=1), capture_output=True, text=True, check=True
        )
        assert f"{ITEMS} items -> 21 samples, 3 rejected" in finish.stdout
        assert content(out) == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_worker_that_is_killed_does_not_stop_the_others(
    source: Path, vqgan: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(source, vqgan, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: process.poll() is not None or done(out) > 0)
    victim = next(
        pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    missing = [number for number in range(CHUNKS) if not (out / f"chunk-{number:06d}").exists()]
    if missing:  # unless it was killed after its last chunk
        assert process.returncode == 1
        assert len({number % 2 for number in missing}) == 1
        assert "was killed by signal 9" in errors
        assert f"missing {len(missing)} of {CHUNKS} chunks: chunk-{missing[0]:06d}" in errors
        assert "Traceback" not in errors
    run_here(settings(vqgan, chunk_size=2), source, out)
    merge(str(out))
    assert content(out) == expected


@pytest.mark.slow
def test_ranks_by_hand_and_a_merge_give_the_same(
    source: Path, vqgan: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """One process for each rank, started together."""
    out = tmp_path / "out"
    ranks = [
        subprocess.Popen(
            [*command(source, vqgan, out), "--rank", str(rank)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    assert not (out / "index.json").exists()
    merge(str(out))
    assert content(out) == expected


@pytest.mark.slow
def test_a_config_error_in_a_worker_is_raised_in_the_parent(
    source: Path, vqgan: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "vqgan.yaml").write_text(
        (vqgan / "vqgan.yaml").read_text().replace("n_embed: 64", "n_embed: 65")
    )
    (weights / "vqgan.safetensors").write_bytes((vqgan / "vqgan.safetensors").read_bytes())
    job = prepare(settings(weights), [str(source)], str(tmp_path / "out"))
    with pytest.raises(
        ConfigError, match=r"quantize.embedding.weight is \[64, 4\], the .yaml says \[65, 4\]"
    ):
        launch(job, splits=1)


def test_reports_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []

    class Messages:
        def send(self, message: tuple[int, int]) -> None:
            sent.append(message)

    reporter = Reporter(Messages())  # type: ignore[arg-type]
    for _ in range(1000):
        reporter(1, 0)
    reporter(1, 1)
    reporter.flush()
    assert len(sent) < 10
    assert [sum(column) for column in zip(*sent, strict=True)] == [1001, 1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "out/chunk-000001"),
            "stopped: [Errno 28] No space left on device",
        ),
        (
            StoreError("s3://bucket/x: no such bucket: bucket"),
            "stopped: s3://bucket/x: no such bucket: bucket",
        ),
        (MemoryError(), "stopped: out of memory"),
    ],
)
def test_a_failing_disk_or_store_ends_a_worker_with_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = messages_of_worker(error, monkeypatch)
    assert messages[0] == (0, 0)
    assert messages[1].startswith(line)
    assert capsys.readouterr().err == ""


def test_a_config_error_is_sent_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = messages_of_worker(ConfigError("weights: no such folder"), monkeypatch)
    assert isinstance(message, ConfigError)


def messages_of_worker(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the messages of a worker, run in this process, whose work raises `error`."""

    def run_rank(*_: object) -> None:
        raise error

    class Messages(list[Any]):
        send = list.append

    messages = Messages()
    monkeypatch.setattr("unitoken.tokenize.executors.local._end_with_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setitem(
        sys.modules, "unitoken.tokenize.pipeline.worker", types.SimpleNamespace(run_rank=run_rank)
    )
    with contextlib.suppress(SystemExit):
        run_worker(None, 0, 1, messages)  # type: ignore[arg-type]
    return messages

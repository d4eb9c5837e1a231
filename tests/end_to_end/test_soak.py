"""The whole tokenization under blows: kills, a cluster that loses a node, buckets, servers and disks that fail.

Each test has a short form, which `make test` and `make test-cloud` run, and a long one for `make chaos`.
"""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support import soak
from support.clusters import two_nodes
from support.processes import wait_for
from support.services import CLOUDS, Service, started, used
from unitoken.storage import retry
from unitoken.storage.open import open_store

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@dataclass(frozen=True)
class Undisturbed:
    """A source, and the dataset of it that one run without any disturbance made."""

    size: soak.Size
    source: Path
    out: str
    content: dict[str, str]


def undisturbed(size: soak.Size, folder: Path) -> Undisturbed:
    source = soak.make_source(folder / "source", size.items)
    out = str(folder / "out")
    soak.finish(source, out, size, "--splits", "2")
    soak.check_counts(out, size)
    return Undisturbed(size, source, out, soak.content(out))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(soak.SHORT, id="short", marks=pytest.mark.slow),
        pytest.param(soak.FULL, id="full", marks=pytest.mark.chaos),
    ],
)
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(request.param, tmp_path_factory.mktemp("undisturbed"))


@functools.cache
def short_of_clouds(folder: Path) -> Undisturbed:
    return undisturbed(soak.SHORT_OF_CLOUDS, folder)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return short_of_clouds(tmp_path_factory.getbasetemp() / "short-of-clouds")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="short", marks=pytest.mark.slow),
        pytest.param(soak.FULL, id="full", marks=pytest.mark.chaos),
    ],
)
def of_clouds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    if request.param is None:
        return short_of_clouds(tmp_path_factory.getbasetemp() / "short-of-clouds")
    return undisturbed(request.param, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module", params=CLOUDS)
def cloud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with started(request.param, tmp_path_factory.mktemp("cloud") / request.param) as service, used(service):
        yield service


def test_kills_at_random_moments_lose_and_change_nothing(expected: Undisturbed, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    soak.kill_again_and_again(expected.source, out, expected.size)
    soak.finish(expected.source, out, expected.size, "--splits", "2")
    assert soak.content(out) == expected.content


def test_a_cluster_that_loses_a_node_gives_the_same_bytes(expected: Undisturbed, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    command = soak.command(expected.source, out, expected.size, "--engine", "ray")
    with two_nodes() as nodes:
        environment = os.environ | nodes.environment
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wait_for(
            lambda: process.poll() is not None or soak.done(out) >= expected.size.chunks // 3, seconds=600
        )
        assert process.poll() is None, process.communicate()
        nodes.kill_node()
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert soak.content(out) == expected.content


@pytest.mark.cloud
def test_a_bucket_gets_the_same_bytes_and_streaming_reads_them(
    of_clouds: Undisturbed, cloud: Service, tmp_path: Path
) -> None:
    """The run is killed once."""
    from streaming import StreamingDataset

    from unitoken.tokenize.checks.verify import verify

    out = cloud.url(f"soak-{of_clouds.size.items}")
    soak.kill_again_and_again(
        of_clouds.source, out, soak.Size(of_clouds.size.items, of_clouds.size.chunk_size, kills=1)
    )
    soak.finish(of_clouds.source, out, of_clouds.size, "--splits", "2")
    assert soak.content(out) == of_clouds.content
    assert verify(out, 1.0) == []
    theirs = StreamingDataset(remote=out, local=str(tmp_path / "cache"), batch_size=1, shuffle=False)
    ours = StreamingDataset(local=of_clouds.out, batch_size=1, shuffle=False)
    assert len(theirs) == len(ours) == of_clouds.size.items - of_clouds.size.bad
    for there, here in zip(theirs, ours, strict=True):
        assert there["id"] == here["id"]
        assert there["tokens"].tolist() == here["tokens"].tolist()


@pytest.mark.cloud
def test_a_run_resumes_after_its_bucket_was_unreachable(
    short: Undisturbed, cloud: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unitoken.tokenize.__main__ import app

    out = cloud.url("gone")
    command = soak.command(short.source, out, short.size, "--rank", "0")[3:]
    monkeypatch.setattr(retry, "RETRY_SECONDS", 2.0)
    open_store.cache_clear()

    def end_the_server() -> None:
        wait_for(lambda: soak.done(out) >= 5)
        cloud.stop()

    ending = threading.Thread(target=end_the_server)
    ending.start()
    begun = time.monotonic()
    result = CliRunner().invoke(app, command)
    ending.join()
    assert result.exit_code == 1
    assert f"error: {out}/" in result.stderr
    assert "the same command goes on from here" in result.stderr
    assert time.monotonic() - begun < 100
    cloud.start()
    assert 0 < soak.done(out) < short.size.chunks
    soak.finish(short.source, out, short.size)
    assert soak.content(out) == short.content


@pytest.mark.slow
def test_a_run_resumes_after_its_disk_was_full(tmp_path: Path) -> None:
    """No file may be longer than 60 kB, which the shards are: the system's error is another number, nothing else."""
    size = soak.Size(items=600, chunk_size=300, kills=0)
    source, out = soak.make_source(tmp_path / "source", size.items), str(tmp_path / "out")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run = subprocess.run(soak.command(source, out, size), capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 1
    assert "error: worker 0 stopped: " in run.stderr
    assert "File too large" in run.stderr
    assert "missing 2 of 2 chunks" in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in Path(out).iterdir()) == [
        "input.json",
        "job.json",
        "settings.yaml",
        "vocabulary.json",
    ]
    soak.finish(source, out, size)
    soak.check_counts(out, size)

"""Ray: the chunks of a task, and how a task ends. test_soak.py kills a node."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from support.clusters import private
from support.tokenizing import settings, some_items, write_items
from unitoken.common.errors import ConfigError
from unitoken.storage.store import StoreError
from unitoken.tokenize.executors import ray_cluster
from unitoken.tokenize.executors.ray_cluster import launch_on_ray
from unitoken.tokenize.job import Chunk, Job
from unitoken.tokenize.pipeline.timing import Times
from unitoken.tokenize.prepare import prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return write_items(tmp_path / "source", some_items(tmp_path / "source", 12))


@pytest.fixture
def job(vqgan: Path, source: Path, tmp_path: Path) -> Job:
    return prepare(settings(vqgan, chunk_size=2), [str(source)], str(tmp_path / "out"))


@pytest.mark.slow
def test_without_a_cluster_one_is_started_here(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names start at the current folder of the command."""
    monkeypatch.chdir(Path(job.out).parent)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in private().items():
        monkeypatch.setenv(name, value)
    here = prepare(job.config, ["source/items.json"], "out")
    program = (
        "import pickle, sys; from unitoken.tokenize.executors.ray_cluster import launch_on_ray as f; "
        "print(f(pickle.load(sys.stdin.buffer)))"
    )
    process = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(here), capture_output=True)
    assert process.stdout.decode().splitlines()[-1:] == ["[]"], process.stderr.decode()
    assert here.missing() == []


def test_a_finished_job_starts_no_cluster(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_start_ray", lambda: pytest.fail("started"))
    for chunk in job.chunks():
        (Path(job.out) / chunk.name).mkdir()
        (Path(job.out) / chunk.name / "index.json").touch()
    assert launch_on_ray(job) == []


def test_without_ray_the_error_says_how_to_have_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'needs Ray: pip install "unitoken-streaming\[ray\]"'):
        launch_on_ray(job)


def test_an_address_without_a_cluster_is_an_error_at_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127.0.0.1:9: .*refused"):
        launch_on_ray(job)


class InOneProcess:
    """The part of Ray that `_run_tasks` uses; a task runs when it is submitted."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            cause: Exception

    def __init__(self, cpus: float = 1, gpus: float = 0) -> None:
        self.resources = {"CPU": cpus, "GPU": gpus}
        self.options: dict[str, object] = {}

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def put(self, value: object) -> object:
        return value

    def remote(self, **options: object) -> Any:
        self.options = options
        outcomes: dict[int, object] = {}

        def submit(function: Any) -> Any:
            def task(*arguments: object) -> int:
                try:
                    outcomes[len(outcomes)] = function(*arguments)
                except Exception as error:
                    outcomes[len(outcomes)] = error
                return len(outcomes) - 1

            self.outcomes = outcomes
            return types.SimpleNamespace(remote=task)

        return submit

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return references[:1], references[1:]

    def get(self, reference: int) -> object:
        outcome = self.outcomes[reference]
        if isinstance(outcome, Exception):
            error = self.exceptions.RayError()
            error.cause = outcome
            raise error
        return outcome

    def shutdown(self) -> None:
        pass


def launched(
    job: Job, monkeypatch: pytest.MonkeyPatch, run_chunks: Any, ray: InOneProcess | None = None
) -> list[str]:
    monkeypatch.setattr(ray_cluster, "_start_ray", lambda: ray or InOneProcess())
    monkeypatch.setitem(
        sys.modules, "unitoken.tokenize.pipeline.worker", types.SimpleNamespace(run_chunks=run_chunks)
    )
    return launch_on_ray(job)


def test_each_chunk_is_in_one_task_of_a_few_chunks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def run_chunks(_: Job, chunks: list[Chunk], report: Any, device: str) -> Times:
        given.append([chunk.name for chunk in chunks])
        report(len(chunks), 0)
        return Times()

    assert launched(job, monkeypatch, run_chunks) == []
    assert [name for group in given for name in group] == [chunk.name for chunk in job.chunks()]
    chunks = [Chunk(f"chunk-{number:06d}", ((number, None),)) for number in range(1000)]
    assert {len(group) for group in ray_cluster._chunks_of_tasks(chunks, 8)} == {4}
    assert [len(group) for group in ray_cluster._chunks_of_tasks(chunks[:40], 8)] == [1] * 40


def test_a_task_takes_a_gpu_if_any_and_keeps_its_process(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in (0, 16):
        ray = InOneProcess(cpus=64, gpus=gpus)
        launched(job, monkeypatch, lambda *_: Times(), ray)
        assert ray.options["num_gpus"] == min(gpus, 1)
        assert ray.options["max_calls"] == 0
        assert ray.options["retry_exceptions"] is False


def test_a_second_attempt_skips_what_the_first_has_done(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[str] = []

    def run_chunks(_: Job, chunks: list[Chunk], report: Any, device: str) -> Times:
        assert Path.cwd() == tmp_path
        given.extend(chunk.name for chunk in chunks)
        return Times()

    monkeypatch.chdir("/")  # run_task changes it; pytest changes it back
    monkeypatch.setitem(
        sys.modules, "unitoken.tokenize.pipeline.worker", types.SimpleNamespace(run_chunks=run_chunks)
    )
    (Path(job.out) / "chunk-000001").mkdir()
    (Path(job.out) / "chunk-000001" / "index.json").touch()
    ray_cluster.run_task(job, job.chunks()[:3], str(tmp_path))
    assert given == ["chunk-000000", "chunk-000002"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "out/chunk-000001"),
            "No space left on device: 'out/chunk-000001'",
        ),
        (
            StoreError("s3://bucket/x: no such bucket: bucket"),
            "chunk-000000: s3://bucket/x: no such bucket: bucket",
        ),
        (MemoryError(), "chunk-000000: out of memory"),
        (
            RuntimeError("CUDA error:\nan illegal memory access"),
            "RuntimeError: CUDA error: an illegal memory access",
        ),
    ],
)
def test_a_failed_task_is_reported_in_one_line(
    job: Job, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def run_chunks(*_: object) -> Times:
        raise error

    lines = launched(job, monkeypatch, run_chunks)
    assert len(lines) == 6
    assert all("\n" not in text for text in lines)
    assert line in lines[0]


def test_a_config_error_in_a_task_ends_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_chunks(*_: object) -> Times:
        raise ConfigError("weights: no such folder")

    with pytest.raises(ConfigError, match="weights: no such folder"):
        launched(job, monkeypatch, run_chunks)

"""Tokenize with tasks of a Ray cluster, which starts them again elsewhere when a node dies.

A node needs what this machine has: the same packages, and input, weights and output under the same names -
shared folders or URLs. What a task writes depends on its chunks alone, so a task that runs twice does no
harm.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unitoken.common.errors import ConfigError, one_line
from unitoken.tokenize.executors.local import failure_line, show_times
from unitoken.tokenize.executors.progress import Progress, progress_of, show_progress
from unitoken.tokenize.job import Chunk, Job
from unitoken.tokenize.pipeline.timing import Times

CHUNKS_PER_TASK = (
    4  # at most: enough to keep the GPU busy across their borders, few to repeat when a node dies
)
RETRIES = 5  # of a task whose node or process dies


@dataclass(frozen=True)
class _TaskResult:
    items: int = 0
    rejected: int = 0
    times: Times | None = None
    mistake: str | None = None  # the text of a ConfigError: no other task would succeed
    failure: str | None = None


def launch_on_ray(job: Job) -> list[str]:
    """Tokenize the missing chunks.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine; otherwise starts a cluster here.

    Returns:
        What went wrong, a line for each task that failed.

    Raises:
        ConfigError: Ray is not installed, there is no such cluster, or a task raised a ConfigError.
    """
    missing = job.missing()
    if not missing:
        return []
    ray = _start_ray()
    try:
        with show_progress(progress_of(job, job.chunks())) as bar:
            return _run_tasks(ray, job, missing, bar)
    finally:
        ray.shutdown()


def _start_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError('--engine ray needs Ray: pip install "unitoken-streaming[ray]"') from None
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdigit():
            # Without a server there Ray would try for two minutes, and exit.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {one_line(error, 200)}") from None
    return ray


def _run_tasks(ray: Any, job: Job, missing: list[Chunk], bar: Progress) -> list[str]:
    """Run tasks for all missing chunks. Returns a line for each task that failed."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    # max_calls=0: the process stays, and with it its models; a task with a GPU would take its process along.
    task = ray.remote(
        num_cpus=1, num_gpus=min(gpus, 1), max_calls=0, max_retries=RETRIES, retry_exceptions=False
    )(run_task)
    shared_job = ray.put(job)
    pending = {
        task.remote(shared_job, chunks, os.getcwd()): chunks  # noqa: PTH109 - as the shell has it
        for chunks in _chunks_of_tasks(missing, gpus or int(resources.get("CPU", 1)))
    }
    failures: list[str] = []
    times: list[Times] = []
    while pending:
        ready, _ = ray.wait(list(pending), timeout=1.0)
        for reference in ready:
            result = _get_result(ray, reference)
            chunks = pending.pop(reference)
            if result.mistake:
                raise ConfigError(result.mistake)
            bar.advance(result.items, result.rejected)
            if result.failure:
                failures.append(f"{', '.join(chunk.name for chunk in chunks)}: {result.failure}")
            if result.times is not None:
                times.append(result.times)
        bar.show()
    show_times(times)
    return failures


def _chunks_of_tasks(chunks: Sequence[Chunk], slots: int) -> Iterator[list[Chunk]]:
    """Cut the chunks into tasks so small that every slot gets several, and none waits long for the last."""
    size = max(1, min(CHUNKS_PER_TASK, len(chunks) // (4 * max(slots, 1))))
    for start in range(0, len(chunks), size):
        yield list(chunks[start : start + size])


def _get_result(ray: Any, reference: Any) -> _TaskResult:
    try:
        result: _TaskResult = ray.get(reference)
    except ray.exceptions.RayError as error:  # the process or its node died too often, or a bug of ours
        cause = getattr(error, "cause", None) or error
        return _TaskResult(failure=f"{type(cause).__name__}: {one_line(cause, 300)}")
    return result


def run_task(job: Job, chunks: list[Chunk], folder: str) -> _TaskResult:
    """Write some chunks, in a process of the cluster.

    Args:
        job: the run.
        chunks: the chunks to write; those that are done already are skipped, as this may be a second attempt.
        folder: the current folder of the command, where relative names start.
    """
    import torch

    from unitoken.tokenize.pipeline.worker import run_chunks

    items = rejected = 0

    def report(more_items: int, more_rejected: int) -> None:
        nonlocal items, rejected
        items, rejected = items + more_items, rejected + more_rejected

    try:
        os.chdir(folder)
        missing = [chunk for chunk in chunks if not job.output.is_done(chunk.name)]
        times = run_chunks(job, missing, report, "cuda" if torch.cuda.is_available() else "cpu")
    except ConfigError as error:
        return _TaskResult(mistake=str(error))
    except (OSError, MemoryError) as error:
        return _TaskResult(items, rejected, failure=failure_line(error))
    return _TaskResult(items, rejected, times)

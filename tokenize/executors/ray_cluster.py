"""The missing chunks as tasks of a Ray cluster, which starts them again elsewhere when a node dies.

A node needs what this machine has: the same packages, and input, weights and output under the same names - shared
folders or URLs. What a task writes depends on its chunks alone, so a task that is done twice does no harm.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.tokenize.executors.local import failure_line, show_times
from unitoken.tokenize.executors.progress import Progress, share_of, show_progress
from unitoken.tokenize.job import Chunk, Job
from unitoken.tokenize.pipeline.timing import Times

GROUP = 4  # chunks a task at most: enough that the GPU's queue runs over their borders, few to do again
RETRIES = 5  # of a task whose node or process dies


@dataclass(frozen=True)
class _Outcome:
    items: int = 0
    rejected: int = 0
    times: Times | None = None
    mistake: str | None = None  # of the user's: no other task will do better
    failure: str | None = None


def launch_on_ray(job: Job) -> list[str]:
    """Tokenize the missing chunks. Returns what went wrong, a line for each task that failed.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, and else starts one here.

    Raises:
        ConfigError: no Ray, no such cluster, or what a task found not to fit.
    """
    missing = job.missing()
    if not missing:
        return []
    ray = _start_ray()
    try:
        with show_progress(share_of(job, job.chunks())) as bar:
            return _run(ray, job, missing, bar)
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
            socket.create_connection(
                (host, int(port)), timeout=10
            ).close()  # else Ray tries for two minutes, and exits
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"no Ray cluster at {address or 'this machine'}: {' '.join(str(error).split())[:200]}"
        ) from None
    return ray


def _run(ray: Any, job: Job, missing: list[Chunk], bar: Progress) -> list[str]:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    # max_calls=0: the process stays, and with it its models; a task with a GPU would take its process along.
    task = ray.remote(
        num_cpus=1, num_gpus=min(gpus, 1), max_calls=0, max_retries=RETRIES, retry_exceptions=False
    )(_do)
    shared = ray.put(job)
    pending = {
        task.remote(shared, group, os.getcwd()): group  # noqa: PTH109 - as the shell has it
        for group in _groups(missing, gpus or int(resources.get("CPU", 1)))
    }
    failures: list[str] = []
    times: list[Times] = []
    while pending:
        ready, _ = ray.wait(list(pending), timeout=1.0)
        for reference in ready:
            outcome = _outcome(ray, reference)
            group = pending.pop(reference)
            if outcome.mistake:
                raise ConfigError(outcome.mistake)
            bar.advance(outcome.items, outcome.rejected)
            if outcome.failure:
                failures.append(f"{', '.join(chunk.name for chunk in group)}: {outcome.failure}")
            if outcome.times is not None:
                times.append(outcome.times)
        bar.show()
    show_times(times)
    return failures


def _groups(chunks: Sequence[Chunk], slots: int) -> Iterator[list[Chunk]]:
    """Small enough that every slot has several tasks and none waits long for the last."""
    size = max(1, min(GROUP, len(chunks) // (4 * max(slots, 1))))
    for start in range(0, len(chunks), size):
        yield list(chunks[start : start + size])


def _outcome(ray: Any, reference: Any) -> _Outcome:
    try:
        outcome: _Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:  # the process or its node died too often, or a mistake of ours
        cause = getattr(error, "cause", None) or error
        return _Outcome(failure=f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
    return outcome


def _do(job: Job, chunks: list[Chunk], folder: str) -> _Outcome:
    """In a process of the cluster."""
    import torch

    from unitoken.tokenize.pipeline.worker import run_chunks

    items = rejected = 0

    def report(finished: int, bad: int) -> None:
        nonlocal items, rejected
        items, rejected = items + finished, rejected + bad

    try:
        os.chdir(folder)  # where the command was given: relative names are seen from there
        missing = [
            chunk for chunk in chunks if not job.output.is_done(chunk.name)
        ]  # this may be a second attempt
        times = run_chunks(job, missing, report, "cuda" if torch.cuda.is_available() else "cpu")
    except ConfigError as error:
        return _Outcome(mistake=str(error))
    except (OSError, MemoryError) as error:
        return _Outcome(items, rejected, failure=failure_line(error))
    return _Outcome(items, rejected, times)

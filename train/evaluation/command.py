"""`unitoken evaluate`: a checkpoint's scores on a suite of tasks, by any number of ranks.

Ranks share a folder and no memory: each loads the whole model and does its share of the units. What is done
is a file, so the same command continues after a kill, with as many ranks as it likes.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitoken.common.cli import notify, report
from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, exclusive_lock, write_aside
from unitoken.common.hashing import sha256_of_file
from unitoken.common.interruption import end_with_launcher
from unitoken.common.urls import without_secrets
from unitoken.dataset.vision_views import Views
from unitoken.storage.store import is_url
from unitoken.train.checkpoint.locations import (
    STEP,
    is_checkpoint,
    is_export,
    read_mark,
    step_of,
)
from unitoken.train.checkpoint.metadata import metadata_folder, read_metadata, read_sizes
from unitoken.train.checkpoint.sharded_index import read_checkpoint_index
from unitoken.train.config import StageConfig
from unitoken.train.evaluation.task_folder import RESULT

if TYPE_CHECKING:
    from unitoken.train.evaluation.model import EvaluatedModel
    from unitoken.train.evaluation.opened_suite import OpenedSuite
    from unitoken.train.evaluation.scoring import TaskScores

EVALUATIONS = "evaluations"  # in a run's folder
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_WAIT_SILENTLY = 60.0


def default_out(source: str, origin: Path, suite: Path) -> Path:
    """Return the folder for results: evaluations/SUITE/step-* in the folder of a run.

    Args:
        source: the checkpoint as it was named.
        origin: the file or folder that `find_origin` found.
        suite: the suite's file.

    Raises:
        ConfigError: the checkpoint is not in the folder of a run on this machine.
    """
    if is_url(source):  # its copy here is made anew by every command that reads it
        raise ConfigError(f"{without_secrets(source)}: results of a URL need a folder: name it with --out")
    if not is_checkpoint(origin) or STEP.fullmatch(origin.name) is None:
        raise ConfigError(f"{origin}: not a checkpoint in a run's folder: name a folder with --out")
    return metadata_folder(origin) / EVALUATIONS / suite.stem / f"step-{step_of(origin):08d}"


def start_ranks(number: int | None) -> None:
    """Become Composer's launcher with this process's arguments if there are to be several ranks.

    Args:
        number: of ranks on this machine; None: one a GPU, or one.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:  # set by launchers
        end_with_launcher()
        return
    if "WORLD_SIZE" in os.environ:
        return
    if number is None:
        import torch

        number = torch.cuda.device_count()
    if number > 1:
        arguments = ["-n", str(number), "-m", "unitoken.train", *_evaluate_arguments(sys.argv)]
        os.execv(sys.executable, [sys.executable, "-m", "composer.cli", *arguments])  # noqa: S606 - no shell


def _evaluate_arguments(command_line: Sequence[str]) -> list[str]:
    """Return the arguments from the word `evaluate` on."""
    arguments = list(command_line)
    return arguments[arguments.index("evaluate") :]


def describe_checkpoint(origin: Path) -> dict[str, Any]:
    """Return a checkpoint's path, step and the SHA-256 of each of its files.

    Args:
        origin: the file or folder that `find_origin` found.
    """
    hashes: dict[str, Any]
    if origin.is_file():
        hashes = {origin.name: sha256_of_file(origin)}
    elif is_checkpoint(origin):
        hashes = {file.name: file.sha256 for file in read_checkpoint_index(origin).files}
    else:
        mark = read_mark(origin) if is_export(origin) else None
        known = (mark or {}).get("sha256")
        files = sorted(path.relative_to(origin).as_posix() for path in origin.rglob("*.safetensors"))
        hashes = {
            name: known[name] if isinstance(known, dict) and name in known else sha256_of_file(origin / name)
            for name in files
        }
    step = step_of(origin) if STEP.fullmatch(origin.name) else None
    return {"path": str(origin.resolve()), "step": step, "sha256": hashes}


def evaluate_checkpoint(stage: StageConfig, origin: Path, opened: OpenedSuite, out: Path) -> None:
    """Evaluate a checkpoint on a suite; every rank calls it.

    Args:
        stage: the settings that trained it.
        origin: the file or folder that `find_origin` found.
        opened: the suite.
        out: the folder for results.

    Raises:
        ConfigError: the tasks do not fit the model, or another `evaluate` works in the same folder.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank:
        _evaluate(stage, origin, opened, out, rank, ranks)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_aside(out / f"{ASIDE}writable", b"")
        (out / f"{ASIDE}writable").unlink()
    except OSError as error:
        raise ConfigError(f"{out}: cannot write there: {error.strerror or error}") from None
    lock = out / f"{ASIDE}lock"
    with exclusive_lock(lock, f"{out}: another `evaluate` is at work in it: name another folder, or wait"):
        _evaluate(stage, origin, opened, out, rank, ranks)
    lock.unlink(missing_ok=True)


def _evaluate(
    stage: StageConfig, origin: Path, opened: OpenedSuite, out: Path, rank: int, ranks: int
) -> None:
    from unitoken.train.evaluation.suite import do_share, prepare_tasks, score_tasks, write_result

    model = _model(stage, origin)
    tasks = prepare_tasks(opened, model, out)
    if rank == 0:
        for task in tasks.values():
            task.folder.begin()
    for name, task in tasks.items():
        # A rank that fails ends the others through their launcher.
        _wait_for(task.folder.is_begun)
        do_share(task, rank, ranks, _progress(name))
    if rank == 0:
        for task in tasks.values():
            for unit in range(task.work.units):
                _wait_for(functools.partial(task.folder.has, unit))
        scores = score_tasks(tasks, model.device)
        write_result(out, opened, model, tasks, scores)
        _report(scores, out)


def _model(stage: StageConfig, origin: Path) -> EvaluatedModel:
    import torch

    from unitoken.train.evaluation.model import EvaluatedModel
    from unitoken.train.generation.engine import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # With more threads sums are rounded otherwise, and numbers would depend on the machine's cores, which
    # more ranks can use.
    torch.set_num_threads(1)
    about, (_, vision) = read_metadata(origin), read_sizes(origin, stage.model)
    half = stage.precision == "bf16" and device == "cuda"
    return EvaluatedModel(
        config=stage,
        vocabulary=about.vocabulary,
        pictures=about.pictures,
        views=Views(vision.image_size, vision.patch_size, stage.data.anyres) if vision else None,
        load_network=lambda: load_model(stage.model, origin).to(device, torch.bfloat16 if half else None),
        device=device,
        checkpoint=describe_checkpoint(origin),
    )


def _wait_for(is_done: Callable[[], bool]) -> None:
    """Wait until another rank has done its part; say so if that takes long."""
    start, said = time.monotonic(), False
    while not is_done():
        if not said and time.monotonic() - start > SECONDS_TO_WAIT_SILENTLY:
            notify("waits for what other ranks do; if one has failed, start all of them again")
            said = True
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _progress(name: str) -> Callable[[int, int], None]:
    """Return a function that prints how far a task is, a line every ten seconds."""
    printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            notify(f"{name}: {done} of {total} units of this rank")

    return show


def _report(scores: dict[str, TaskScores], out: Path) -> None:
    for name, task in scores.items():
        shown = [
            f"{key} {value:.4f}" if value % 1 else f"{key} {value:g}" for key, value in task.scores.items()
        ]
        report(f"{name}: {', '.join(shown)}" if shown else f"{name}: replies written")
        if task.command is not None:
            report(f"{name}: score with: {task.command}")
    report(str(out / RESULT))

"""Evaluate a model on a suite: each task's units, then its scores; the result is one JSON object.

OUT/result.json             checkpoint, hash of the prompts, settings of sampling, versions, scores
OUT/TASK/replies.jsonl      each reply with its prompt, what was expected, and its score
OUT/TASK/pictures/0000.png  drawings
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unitoken.common.files import write_aside
from unitoken.common.hashing import sha256_of_file
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.items import TaskItem
from unitoken.train.evaluation.losses import prepare_losses
from unitoken.train.evaluation.model import EvaluatedModel
from unitoken.train.evaluation.opened_suite import OpenedSuite
from unitoken.train.evaluation.replies import prepare_replies
from unitoken.train.evaluation.scoring import TaskScores, score_task
from unitoken.train.evaluation.task_folder import RESULT, TaskFolder, UnitWork

PACKAGES = ("unitoken-streaming", "torch", "transformers", "tokenizers", "numpy", "pillow")


class PreparedTask(NamedTuple):
    """A task as units of work, and the folder for them."""

    config: TaskConfig
    items: list[TaskItem]
    work: UnitWork
    folder: TaskFolder


def prepare_tasks(opened: OpenedSuite, model: EvaluatedModel, out: Path) -> dict[str, PreparedTask]:
    """Check the tasks against the model, and cut them into units. Raises ConfigError."""
    prepared = {}
    for name, task in opened.suite.tasks.items():
        items = opened.items[name]
        if task.dataset is not None:
            work = prepare_losses(name, task, model)
        else:
            work = prepare_replies(name, task, items, model, opened.suite.seed)
        prepared[name] = PreparedTask(task, items, work, TaskFolder(out / name, work.request))
    return prepared


def do_share(task: PreparedTask, rank: int, ranks: int, finished: Callable[[int, int], None]) -> None:
    """Do a rank's share of a task: every `ranks`-th unit, but for those that are done.

    Args:
        task: begun by the first rank.
        rank: this rank's number.
        ranks: their number.
        finished: called after each unit with how many of the share are done, and how many there are.
    """
    share = range(rank, task.work.units, ranks)
    for place, unit in enumerate(share):
        if not task.folder.has(unit):
            task.folder.add(unit, *task.work.do(unit))
            finished(place + 1, len(share))


def score_tasks(tasks: Mapping[str, PreparedTask], device: str) -> dict[str, TaskScores]:
    """Return the scores of each task, of which all units are done. Raises ConfigError."""
    return {
        name: score_task(name, task.config, task.items, task.folder, task.work.units, device)
        for name, task in tasks.items()
    }


def write_result(
    out: Path,
    opened: OpenedSuite,
    model: EvaluatedModel,
    tasks: Mapping[str, PreparedTask],
    scores: Mapping[str, TaskScores],
) -> dict[str, Any]:
    """Write result.json, and return what is in it."""
    results = {}
    for name, task in tasks.items():
        settings = {key: value for key, value in task.work.request.items() if key != "model"}
        results[name] = {
            "scores": scores[name].scores,
            "count": len(task.items) or settings.get("samples"),
            "metrics": ["loss"] if task.config.dataset is not None else task.config.metrics,
            **settings,
            **({"measured_with": scores[name].measured_with} if scores[name].measured_with else {}),
        }
    result = {
        "suite": {"file": opened.file.name, "sha256": sha256_of_file(opened.file), "seed": opened.suite.seed},
        **model.identity,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        },
        "tasks": results,
    }
    write_aside(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False).encode() + b"\n")
    return result

"""A task's units -> its scores, on one rank: they need the replies and not the model that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unitoken.common.hashing import sha256_of_file
from unitoken.common.user_functions import user_function_fingerprint
from unitoken.train.evaluation.answers import ANSWER_SCORES, MetricScores
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.formats import write_format
from unitoken.train.evaluation.items import TaskItem
from unitoken.train.evaluation.losses import score_losses
from unitoken.train.evaluation.pictures import (
    ClipEmbedder,
    classify,
    clip_distance,
    hash_files,
    open_pictures,
    reference_files,
    score_clip,
)
from unitoken.train.evaluation.task_folder import DRAWINGS, Line, TaskFolder
from unitoken.train.generation.prompts import prompt_text

REPLIES = "replies.jsonl"


class TaskScores(NamedTuple):
    """What was measured.

    Attributes:
        scores: by name.
        measured_with: hashes of what else the scores depend on.
        command: scores the replies in another program; None without `write`.
    """

    scores: dict[str, float]
    measured_with: dict[str, str]
    command: str | None


def score_task(
    name: str, task: TaskConfig, items: Sequence[TaskItem], folder: TaskFolder, units: int, device: str
) -> TaskScores:
    """Measure a task's replies or losses, and write replies.jsonl: each reply with its prompt and its score.

    Args:
        name: the task's.
        task: its settings.
        items: its prompts; none of a dataset.
        folder: of the task, with all units done.
        units: how many there are.
        device: where CLIP computes.

    Raises:
        ConfigError: a picture can not be read, there is no CLIP, or the classifier fails.
    """
    lines = folder.lines(units)
    if task.dataset is not None:
        return TaskScores(score_losses(lines), {}, None)
    lines.sort(key=lambda line: line["number"])
    items_of_lines = [items[line["number"] // task.replies] for line in lines]
    measured = _score_replies(name, task, items_of_lines, lines, folder.path, device)
    scores = {key: value for metric in measured.values() for key, value in metric.scores.items()}
    folder.write(REPLIES, list(_described(items_of_lines, lines, measured)))
    command = None if task.write is None else write_format(name, task, items, lines, folder.path)
    return TaskScores(scores, _hashes(name, task), command)


def _score_replies(
    name: str, task: TaskConfig, items: Sequence[TaskItem], lines: Sequence[Line], folder: Path, device: str
) -> dict[str, MetricScores]:
    """Return what each metric says; `items` are the prompts of `lines`."""
    measured: dict[str, MetricScores] = {}
    files = [folder / DRAWINGS / line["picture"] for line in lines if "picture" in line]
    for metric in task.metrics:
        if metric == "classifier":
            assert task.classifier is not None
            measured[metric] = classify(task.classifier, f"tasks.{name}.classifier", items, files)
        elif metric in ANSWER_SCORES:
            texts = [line["text"] for line in lines]
            measured[metric] = ANSWER_SCORES[metric](items, texts)
    if task.clip is not None:
        clip = ClipEmbedder(Path(task.clip), device, f"tasks.{name}.clip")
        drawings = clip.embed_pictures(open_pictures(files))
        if "clip_score" in task.metrics:
            measured["clip_score"] = score_clip(clip.embed_texts(list(map(caption_of, items))), drawings)
        if task.references is not None:
            pictures = clip.embed_pictures(open_pictures(reference_files(Path(task.references))))
            measured["clip_distance"] = MetricScores({"clip_distance": clip_distance(drawings, pictures)}, [])
    return measured


def caption_of(item: TaskItem) -> str:
    """Return the text that a drawing is compared with: the item's `caption`, or else its prompt."""
    given = item.fields.get("caption")
    return given if isinstance(given, str) else prompt_text(item.prompt).strip()


def _described(
    items: Sequence[TaskItem], lines: Sequence[Line], measured: dict[str, MetricScores]
) -> list[dict[str, Any]]:
    """Return each reply with its prompt, what was expected, and what each metric says about it."""
    return [
        {
            **line,
            "id": item.id,
            "prompt": prompt_text(item.prompt),
            "expected": list(item.answers),
            **{metric: found.of_replies[place] for metric, found in measured.items() if found.of_replies},
        }
        for place, (item, line) in enumerate(zip(items, lines, strict=True))
    ]


def _hashes(name: str, task: TaskConfig) -> dict[str, str]:
    hashes = {}
    if task.classifier is not None:
        hashes["classifier"] = user_function_fingerprint(task.classifier, f"tasks.{name}.classifier")
    if task.clip is not None:
        files = sorted(Path(task.clip).glob("*.safetensors"))
        hashes["clip"] = sha256_of_file(files[0]) if len(files) == 1 else hash_files(files)
    if task.references is not None:
        hashes["references"] = hash_files(reference_files(Path(task.references)))
    return hashes

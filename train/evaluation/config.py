"""A suite of tasks that a trained model is evaluated on: the keys of its YAML file.

suite = load_suite(Path("suites/digits.yaml"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from unitoken.common.config import Config, Count, Name, Seed, load_config
from unitoken.common.errors import ConfigError
from unitoken.common.user_functions import user_function_fingerprint

AnswerMetric = Literal["exact_match", "vqa_accuracy", "yes_no"]
DrawingMetric = Literal["classifier", "clip_score", "clip_distance"]
Metric = Literal[AnswerMetric, DrawingMetric]
DRAWING_METRICS = ("classifier", "clip_score", "clip_distance")
DRAWING_FORMATS = ("geneval", "dpg_bench", "mjhq_30k")
DPG_PICTURES = 4
"""The most pictures in a grid of DPG-Bench."""

USERS = {
    "classifier": ("classifier",),
    "clip": ("clip_score", "clip_distance"),
    "references": ("clip_distance",),
}
"""The metrics that use each of these settings."""

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class TaskConfig(Config):
    """One task. Paths are relative to the suite's file."""

    prompts: Name | None = None
    """A .json or .jsonl file of items or of {"prompt": ..., "image": ...}, a .txt file with a prompt a line,
    or a folder of .txt files with a prompt each."""
    dataset: Name | None = None
    """A tokenized dataset instead of prompts: the loss by kind and the perplexity are measured on it."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Measure on this share of the dataset alone: what `held_out` of a stage's stream keeps back."""
    limit: Count | None = None
    """Use the first so many prompts, or samples of the dataset; default all."""
    draw: bool = False
    """Reply with one picture; otherwise with text."""
    size: tuple[Count, Count] | None = None
    """Height and width of drawings in pixels; default: the sizes of the data's images."""
    replies: Annotated[int, Field(gt=0, le=1000)] = 1
    """Replies to each prompt."""
    temperature: Annotated[float, Field(ge=0, le=1e3)] | None = None
    """0 takes the likeliest token; default 0 for answers, 1 for drawings."""
    top_k: Count | None = None
    """Sample each token or code from this many of the likeliest; default: from all."""
    guidance: Annotated[float, Field(ge=0, le=1e3)] | None = None
    """Classifier-free guidance of drawings; default 4, or 1 (none) without data.null_prompt_fraction."""
    max_tokens: Count = 64
    """Most tokens in an answer."""
    batch: Count = 8
    """Prompts, or packs of a dataset, at a time; a unit of work that one rank does as a whole."""
    metrics: list[Metric] = Field(default=[])
    """Of answers: exact_match, vqa_accuracy, yes_no. Of drawings: classifier, clip_score, clip_distance."""
    classifier: Name | None = None
    """path/to/file.py:function, which names what it sees in a picture: (PIL.Image.Image) -> str."""
    clip: Name | None = None
    """Folder of a CLIP in transformers' layout, for clip_score and clip_distance."""
    references: Name | None = None
    """Folder of pictures that drawings are compared with by clip_distance; its sub-folders are read, too."""
    write: Literal["geneval", "dpg_bench", "mjhq_30k", "lmms_eval"] | None = None
    """Write the replies in the layout of another program, too, and print the command that scores them."""

    @pydantic.model_validator(mode="after")
    def _measures_prompts_or_a_dataset(self) -> TaskConfig:
        if (self.prompts is None) == (self.dataset is None):
            raise ValueError("give either `prompts` or `dataset`")
        if self.dataset is not None:
            allowed = {"dataset", "held_out", "limit", "batch"}
            others = sorted(self.model_fields_set - allowed)
            if others:
                raise ValueError(f"`dataset` measures the loss, and has no `{others[0]}`")
        elif not self.metrics and self.write is None:
            raise ValueError("nothing is measured: give `metrics` or `write`")
        if self.prompts is not None and self.held_out:
            raise ValueError("`held_out` belongs to a `dataset`")
        return self

    @pydantic.model_validator(mode="after")
    def _has_metrics_of_its_replies(self) -> TaskConfig:
        for metric in self.metrics:
            if (metric in DRAWING_METRICS) != self.draw:
                kind = "drawings: it needs" if metric in DRAWING_METRICS else "answers: leave out"
                raise ValueError(f"{metric} is a metric of {kind} `draw: true`")
        if self.write is not None and (self.write in DRAWING_FORMATS) != self.draw:
            kind = "drawings: it needs" if self.write in DRAWING_FORMATS else "answers: leave out"
            raise ValueError(f"write: {self.write} is for {kind} `draw: true`")
        if not self.draw and (self.size is not None or self.guidance is not None):
            raise ValueError("`size` and `guidance` are of drawings: they need `draw: true`")
        if self.write == "dpg_bench" and self.replies > DPG_PICTURES:
            raise ValueError(f"replies: a grid of DPG-Bench has up to {DPG_PICTURES} pictures")
        if self.write in ("mjhq_30k", "lmms_eval") and self.replies > 1:
            raise ValueError(f"replies: {self.write} takes one reply to each prompt, found {self.replies}")
        return self

    @pydantic.model_validator(mode="after")
    def _has_what_its_metrics_need(self) -> TaskConfig:
        for key, metrics in USERS.items():
            using = [metric for metric in self.metrics if metric in metrics]
            given = getattr(self, key) is not None
            if using and not given:
                raise ValueError(f"metrics: {using[0]} needs `{key}`")
            if given and not using:
                raise ValueError(f"`{key}` is given, and no metric uses it")
        return self


class Suite(Config):
    """Named tasks."""

    seed: Seed = 0
    """Of the random numbers of all replies."""
    tasks: dict[TaskName, TaskConfig] = Field(min_length=1)
    """The tasks, by names of your choice; each has a folder of that name in the results."""


def load_suite(path: Path) -> Suite:
    """Load a suite, with the paths in it relative to the current folder or absolute.

    Raises:
        ConfigError: there is no such file, or a setting is wrong.
    """
    suite = load_config(Suite, path)
    tasks = {name: _with_paths(task, path.parent) for name, task in suite.tasks.items()}
    return suite.model_copy(update={"tasks": tasks})


def _with_paths(task: TaskConfig, folder: Path) -> TaskConfig:
    keys = ("prompts", "dataset", "classifier", "clip", "references")
    named = {key: getattr(task, key) for key in keys}
    return task.model_copy(
        update={key: str(folder / Path(name).expanduser()) for key, name in named.items() if name is not None}
    )


def check_suite_files(suite: Suite, where: str) -> None:
    """Raise ConfigError for a file or folder that a suite names and that is not there.

    Args:
        suite: loaded with `load_suite`.
        where: the suite's name, for the message.
    """
    for name, task in suite.tasks.items():
        for key in ("dataset", "clip", "references"):
            folder = getattr(task, key)
            if folder is not None and not Path(folder).is_dir():
                raise ConfigError(f"{where}: tasks.{name}.{key}: {folder}: no such folder")
        if task.classifier is not None:
            user_function_fingerprint(task.classifier, f"{where}: tasks.{name}.classifier")

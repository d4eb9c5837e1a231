"""A suite whose files are read and checked, without torch and before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from unitoken.codec.config import CodecConfig
from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.answers import check_answers
from unitoken.train.evaluation.config import Suite, check_suite_files, load_suite
from unitoken.train.evaluation.formats import check_format
from unitoken.train.evaluation.items import TaskItem, read_task_items


class OpenedSuite(NamedTuple):
    """A suite whose files are read and checked.

    Attributes:
        file: the suite's file.
        suite: its settings.
        items: the prompts of each task; none of a dataset.
    """

    file: Path
    suite: Suite
    items: dict[str, list[TaskItem]]


def open_suite(file: Path, codec: CodecConfig | None) -> OpenedSuite:
    """Read a suite and its prompts.

    Args:
        file: the suite's YAML file.
        codec: the tokenizers of the model, which prompts take.

    Raises:
        ConfigError: a file is missing or wrong, an item lacks the answers that a metric needs, or the model
            has no tokenizers.
    """
    suite = load_suite(file)
    check_suite_files(suite, str(file))
    for name, task in suite.tasks.items():
        if task.prompts is not None and codec is None:
            raise ConfigError(
                f"{file}: tasks.{name}: prompts take the data's tokenizers: set codec.tokenizer and "
                "codec.vision.weights of the stage"
            )
    items = {
        name: read_task_items(Path(task.prompts), task.limit) if task.prompts is not None else []
        for name, task in suite.tasks.items()
    }
    for name, task in suite.tasks.items():
        for metric in task.metrics:
            check_answers(metric, items[name])
        check_format(task, items[name])
    return OpenedSuite(file, suite, items)

"""The settings of a suite, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.config import load_suite
from unitoken.train.evaluation.opened_suite import open_suite


def write(folder: Path, task: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(f"tasks: {{a: {{{task}}}}}\n")
    return path


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("metrics: [exact_match]", "give either `prompts` or `dataset`"),
        ("prompts: a.txt", "nothing is measured: give `metrics` or `write`"),
        ("dataset: d, metrics: [exact_match]", "`dataset` measures the loss, and has no `metrics`"),
        ("prompts: a.txt, metrics: [clip_score], clip: c", "clip_score is a metric of drawings: it needs"),
        ("prompts: a.txt, draw: true, metrics: [yes_no]", "yes_no is a metric of answers: leave out"),
        ("prompts: a.txt, draw: true, metrics: [clip_score]", "clip_score needs `clip`"),
        ("prompts: a.txt, draw: true, metrics: [clip_distance], clip: c", "clip_distance needs `references`"),
        ("prompts: a.txt, draw: true, metrics: [classifier]", "classifier needs `classifier`"),
        ("prompts: a.txt, metrics: [yes_no], clip: c", "`clip` is given, and no metric uses it"),
        ("prompts: a.txt, metrics: [yes_no], size: [8, 8]", "`size` and `guidance` are of drawings"),
        ("prompts: a.txt, write: geneval", "write: geneval is for drawings: it needs `draw: true`"),
        ("prompts: a.txt, draw: true, write: lmms_eval", "lmms_eval is for answers: leave out"),
        ("prompts: a.txt, draw: true, write: dpg_bench, replies: 5", "a grid of DPG-Bench has up to 4"),
        ("prompts: a.txt, draw: true, write: mjhq_30k, replies: 2", "mjhq_30k takes one reply"),
        ("prompts: a.txt, metrics: [yes_no], held_out: 0.1", "`held_out` belongs to a `dataset`"),
        ("prompts: a.txt, metrics: [yes]", "tasks.a.metrics"),
        ("prompts: a.txt, metrics: [yes_no], temprature: 1", "unknown key 'tasks.a.temprature'"),
    ],
)
def test_a_wrong_task_is_named(task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suite\.yaml.*") as error:
        load_suite(write(tmp_path, task))
    assert message in str(error.value)


def test_paths_are_relative_to_the_suite(tmp_path: Path) -> None:
    task = load_suite(write(tmp_path, "prompts: in/a.txt, metrics: [yes_no]")).tasks["a"]
    assert task.prompts == str(tmp_path / "in/a.txt")
    (tmp_path / "suite.yaml").write_text("tasks: {a: {dataset: /data/b}}\n")
    assert load_suite(tmp_path / "suite.yaml").tasks["a"].dataset == "/data/b"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("dataset: nowhere", "tasks.a.dataset: .*nowhere: no such folder"),
        (
            "prompts: a.txt, draw: true, metrics: [classifier], classifier: see.py",
            "expected path/to/file.py:f",
        ),
        ("prompts: a.txt, metrics: [exact_match]", "tasks.a: prompts take the data's tokenizers"),
    ],
)
def test_what_a_suite_names_must_be_there(task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_suite(write(tmp_path, task), None)

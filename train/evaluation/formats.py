"""Replies in the layouts of other programs, and the command of theirs that scores them.

geneval     00000/metadata.jsonl, 00000/samples/0000.png, ... by the number of the prompt
dpg_bench   ID.png: the drawings of a prompt in one picture, up to two by two
mjhq_30k    CATEGORY/ID.png, as the reference pictures are laid out
lmms_eval   TASK.json: a log of answers, which lmms-eval's model `from_log` reads
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unitoken.common.errors import ConfigError
from unitoken.common.files import AsideFolder
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.items import TaskItem
from unitoken.train.evaluation.task_folder import DRAWINGS, Line

COMMAND = "command.txt"
_FILE_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)


def check_format(task: TaskConfig, items: Sequence[TaskItem]) -> None:
    """Raise ConfigError for items without what the layout of `write` names files by."""
    for item in items:
        if task.write == "geneval" and not {"tag", "prompt"} <= set(item.fields):
            raise ConfigError(
                f"{item.name}: geneval needs the lines of evaluation_metadata.jsonl, with `tag` and `prompt`"
            )
        keys = {"dpg_bench": ("id",), "mjhq_30k": ("id", "category")}.get(task.write or "", ())
        for key in keys:
            if not _FILE_NAME.fullmatch(str(item.fields.get(key))) or item.fields.get(key) is None:
                raise ConfigError(
                    f"{item.name}: {task.write} names files by `{key}`, which is "
                    f"{json.dumps(item.fields.get(key))[:60]}"
                )


def write_format(
    name: str, task: TaskConfig, items: Sequence[TaskItem], lines: Sequence[Line], folder: Path
) -> str:
    """Write a task's replies in the layout of `write`.

    Args:
        name: the task's; of lmms-eval's task, too.
        task: its settings.
        items: its prompts.
        lines: its replies, by number.
        folder: the task's folder, which gets a folder named like the layout.

    Returns:
        The command that scores them, which is written beside the folder, too.
    """
    assert task.write is not None
    target = folder / task.write
    pictures = [folder / DRAWINGS / line["picture"] for line in lines if "picture" in line]
    of_item = [pictures[first : first + task.replies] for first in range(0, len(pictures), task.replies)]
    with AsideFolder(target) as aside:
        if task.write == "geneval":
            _write_geneval(items, of_item, aside.path)
        elif task.write == "dpg_bench":
            _write_dpg_bench(items, of_item, aside.path)
        elif task.write == "mjhq_30k":
            _write_mjhq(items, of_item, aside.path)
        else:
            _write_lmms_eval(name, items, lines, aside.path)
        shutil.rmtree(target, ignore_errors=True)
        aside.publish()
    command = _command(name, task, pictures, target.resolve())
    (folder / COMMAND).write_text(f"{command}\n", encoding="utf-8")
    return command


def _write_geneval(items: Sequence[TaskItem], pictures: Sequence[Sequence[Path]], folder: Path) -> None:
    for number, (item, files) in enumerate(zip(items, pictures, strict=True)):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        line = json.dumps(item.fields, ensure_ascii=False)
        (samples.parent / "metadata.jsonl").write_text(f"{line}\n", encoding="utf-8")
        for place, file in enumerate(files):
            shutil.copyfile(file, samples / f"{place:04d}.png")


def _write_dpg_bench(items: Sequence[TaskItem], pictures: Sequence[Sequence[Path]], folder: Path) -> None:
    for item, files in zip(items, pictures, strict=True):
        drawings = [Image.open(file).convert("RGB") for file in files]
        width, height = drawings[0].size
        columns, rows = min(len(files), 2), (len(files) + 1) // 2
        grid = Image.new("RGB", (columns * width, rows * height))
        for place, drawing in enumerate(drawings):
            grid.paste(drawing, (place % 2 * width, place // 2 * height))
        grid.save(folder / f"{item.id}.png")


def _write_mjhq(items: Sequence[TaskItem], pictures: Sequence[Sequence[Path]], folder: Path) -> None:
    for item, files in zip(items, pictures, strict=True):
        category = folder / str(item.fields["category"])
        category.mkdir(exist_ok=True)
        shutil.copyfile(files[0], category / f"{item.id}.png")


def _write_lmms_eval(name: str, items: Sequence[TaskItem], lines: Sequence[Line], folder: Path) -> None:
    logs = [
        {
            "doc_id": item.fields.get("doc_id", number),
            "target": item.answers[0] if item.answers else "",
            "resps": [[line["text"]]],
            "filtered_resps": [line["text"]],
        }
        for number, (item, line) in enumerate(zip(items, lines, strict=True))
    ]
    content = {
        "args": {"model": "unitoken", "model_args": "", "limit": None},
        "model_configs": {"task": name},
        "logs": logs,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def _command(name: str, task: TaskConfig, pictures: Sequence[Path], folder: Path) -> str:
    """Return the command that scores the replies; what stands in capitals is the user's to fill in."""
    path, results = shlex.quote(str(folder)), shlex.quote(str(folder.parent / f"{task.write}-results"))
    if task.write == "geneval":
        return (
            f"python evaluation/evaluate_images.py {path} --outfile {results}.jsonl --model-path DETECTOR "
            f"&& python evaluation/summary_scores.py {results}.jsonl"
        )
    if task.write == "dpg_bench":
        with Image.open(pictures[0]) as picture:
            side = picture.width
        return (
            f"accelerate launch --num_processes 1 dpg_bench/compute_dpg_bench.py --image-root-path {path} "
            f"--resolution {side} --pic-num {task.replies} --vqa-model mplug --res-path {results}.txt"
        )
    if task.write == "mjhq_30k":
        program = "import sys; from cleanfid import fid; print(fid.compute_fid(*sys.argv[1:]))"
        return f"python -c {shlex.quote(program)} {path} MJHQ30K_IMGS"
    return (
        f"python -m lmms_eval --model from_log --model_args logs={path} --tasks {name} --batch_size 1 "
        f"--output_path {results}"
    )

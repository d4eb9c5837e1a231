"""What a run writes for people, in its folder.

    metrics.jsonl            a line per step and per evaluation (callbacks/metrics.py)
    starts.jsonl             a line each time that the run started: from which step, and how far it had come
    samples/step-00001000/   drawings and answers of that step (callbacks/samples.py)

Neither torch nor Composer is needed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unitoken.common.cli import warn
from unitoken.common.files import write_aside

METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
SAMPLES = "samples"
DRAWINGS, ANSWERS = "drawings.txt", "answers.txt"  # in the folder of a step
_SAMPLES_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Start:
    """A start of a run.

    Attributes:
        step: the steps that were done.
        reached: the last step of the start before; those after `step` were repeated.
        ranks: the number of ranks.
        time: in UTC, to the second.
    """

    step: int
    reached: int
    ranks: int
    time: str


def note_start(folder: Path, step: int, reached: int, ranks: int) -> None:
    """Add a line to starts.jsonl."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [asdict(start) for start in read_starts(folder)]
    lines.append(asdict(Start(step, reached, ranks, time)))
    write_aside(folder / STARTS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_starts(folder: Path) -> list[Start]:
    """Return the starts of a run, the first one first; none of a run of before they were noted."""
    starts = []
    if (folder / STARTS).is_file():
        for line in _json_lines(folder / STARTS):
            reached, ranks = line.get("reached"), line.get("ranks")
            if isinstance(reached, int) and isinstance(ranks, int):
                starts.append(Start(line["step"], reached, ranks, str(line.get("time", ""))))
            else:
                warn(f"{folder / STARTS}: a line is broken and left out")
    return starts


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file, evaluations included.

    A line that a kill or a disk has broken is left out with a warning.
    """
    return _json_lines(path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file that name a step."""
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            line: Any = text
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text) if text.strip() else None
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line
            elif line is not None:
                warn(f"{path}: line {number} is broken and left out")


def sample_folders(folder: Path) -> dict[int, Path]:
    """Return the folders of the samples of a run by their steps, in order."""
    parent = folder / SAMPLES
    entries = parent.iterdir() if parent.is_dir() else ()
    steps = {int(match[1]): path for path in entries if (match := _SAMPLES_STEP.fullmatch(path.name))}
    return dict(sorted(steps.items()))


def write_rows(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Write one line per row, its cells separated by tabs; line breaks in cells become spaces."""
    path.write_text("".join(" ".join("\t".join(row).splitlines()) + "\n" for row in rows), "utf-8")


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows that `write_rows` wrote; none if there is no such file."""
    if not path.is_file():
        return []
    return [line.split("\t") for line in path.read_text("utf-8", errors="replace").splitlines()]

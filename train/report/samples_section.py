"""The samples of a run over its steps: drawings side by side, answers in a table."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from unitoken.common.html_page import html_table, picture_url
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decoded
from unitoken.train.run.log_files import ANSWERS, DRAWINGS, read_rows, sample_folders

SHOWN_STEPS = 8  # of each prompt, spread over the run
SHOWN_PROMPTS = 12
LONGEST_SIDE = 192  # pixels of a drawing in the report
LARGEST_FILE = 64 << 20  # bytes of a drawing that is read


def samples_section(folder: Path, title: str) -> str:
    """Return a section with the samples of a run; nothing if it has none."""
    folders = _spread(sample_folders(folder))
    drawings, answers = _drawings(folders), _answers(folders)
    if not drawings and not answers:
        return ""
    return f"<section><h2>{html.escape(title)}</h2>{drawings}{answers}</section>"


def _spread(folders: Mapping[int, Path]) -> dict[int, Path]:
    """Return the first, the last, and others between them, at about equal distances."""
    steps = list(folders)
    if len(steps) > SHOWN_STEPS:
        last = len(steps) - 1
        steps = [steps[round(number * last / (SHOWN_STEPS - 1))] for number in range(SHOWN_STEPS)]
    return {step: folders[step] for step in steps}


def _drawings(folders: Mapping[int, Path]) -> str:
    """Return a table with a row for each prompt and a column for each step."""
    pictures: dict[str, dict[int, str]] = {}
    for step, folder in folders.items():
        for row in read_rows(folder / DRAWINGS)[:SHOWN_PROMPTS]:
            if len(row) == 2 and Path(row[0]).name == row[0]:
                pictures.setdefault(row[1], {})[step] = _picture(folder / row[0], f"step {step:,}: {row[1]}")
    if not pictures:
        return ""
    head = "".join(f"<th>step {step:,}</th>" for step in folders)
    rows = []
    for prompt, by_step in pictures.items():
        cells = "".join(f"<td>{by_step.get(step, '')}</td>" for step in folders)
        rows.append(f"<tr><th>{html.escape(prompt)}</th>{cells}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table class="drawings"><tr><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _picture(path: Path, about: str) -> str:
    """Return a drawing as an <img>, made smaller if it is large; a note if it can not be read."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            return "too large"
        with decoded(path.read_bytes()) as picture:
            copy = picture.convert("RGB")
            copy.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            buffer = io.BytesIO()
            copy.save(buffer, "PNG")
    except (OSError, ImageError):
        return "missing"
    text = html.escape(about)
    return f'<img src="{picture_url(buffer.getvalue())}" alt="{text}" title="{text}">'


def _answers(folders: Mapping[int, Path]) -> str:
    """Return a table with a row for each question and a column for each step."""
    texts: dict[tuple[str, str], dict[int, str]] = {}
    for step, folder in folders.items():
        for row in read_rows(folder / ANSWERS)[:SHOWN_PROMPTS]:
            if len(row) >= 3:
                texts.setdefault((row[0], row[1]), {})[step] = "\t".join(row[2:])
    if not texts:
        return ""
    head: Sequence[str] = ["picture", "question", *(f"step {step:,}" for step in folders)]
    rows = [
        [Path(picture).name, question, *(by_step.get(step, "") for step in folders)]
        for (picture, question), by_step in texts.items()
    ]
    return f"<h3>Answers</h3>{html_table(head, rows)}"

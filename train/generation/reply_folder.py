"""The folder of replies: written as they come, so that a run that is killed loses nothing, and the same command goes on.

out/0000.png, 0000-1.png, ...   what was drawn for prompt 0, in order
out/0000.txt                    what was said, with `<|image|>` where a picture stands
out/results.jsonl               a line a reply, behind its files; in the order in which they were made
out/request.json                what was asked of which checkpoint: replies to anything else are replaced
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, write_aside

RESULTS = "results.jsonl"
REQUEST = "request.json"
OURS = re.compile(r"[0-9]{4,}(-[0-9]+)?\.(png|txt)")

Line = dict[str, Any]


def check_reply_folder(folder: Path, inputs: Sequence[Path]) -> None:
    """Nothing of anybody else's is overwritten or removed. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / f"{ASIDE}writable", b"")
        (folder / f"{ASIDE}writable").unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write there: {error.strerror or error}") from None
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{path}: it is inside --out {folder}, where replies are written: name another folder"
            )
    others = [path.name for path in folder.iterdir() if not path.name.startswith(ASIDE)]
    if others and _read(folder) is None:
        raise ConfigError(
            f"{folder}: it holds {min(others)} and no {RESULTS} of replies: name an empty folder"
        )


class Replies:
    """`request` is all that replies depend on, as JSON has it."""

    def __init__(self, folder: Path, request: Line) -> None:
        self._folder, self._request = folder, request

    def begin(self) -> set[int]:
        """The numbers of the replies that are there already. Those to another request are removed, and nothing else."""
        lines = _read(self._folder) or []
        if _request(self._folder) == self._request:
            lines = [
                line for line in lines if all((self._folder / name).is_file() for name in line["pictures"])
            ]
        else:
            for name in (name for line in lines for name in _files(line)):
                (self._folder / name).unlink(missing_ok=True)
            lines = []
        # Without the part of a line that a kill may have left; and before the request, which says whose they are.
        write_aside(self._folder / RESULTS, b"".join(map(_dump, lines)))
        write_aside(self._folder / REQUEST, _dump(self._request))
        return {line["number"] for line in lines}

    def add(self, replies: Sequence[tuple[Line, Mapping[str, bytes]]]) -> None:
        """A line each, and its files by name."""
        for _, files in replies:
            for name, data in files.items():
                write_aside(self._folder / name, data)
        with open(self._folder / RESULTS, "ab") as file:
            file.write(b"".join(_dump(line) for line, _ in replies))


def _dump(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _read(folder: Path) -> list[Line] | None:
    """Its whole lines; None where it is no folder of replies."""
    try:
        *whole, _ = (folder / RESULTS).read_bytes().split(b"\n")
        lines = [json.loads(line) for line in whole]
    except (OSError, ValueError):
        return None
    ours = all(isinstance(line, dict) and {"number", "prompt", "pictures"} <= set(line) for line in lines)
    return lines if ours else None


def _request(folder: Path) -> Any:
    try:
        return json.loads((folder / REQUEST).read_bytes())
    except (OSError, ValueError):
        return None


def _files(line: Line) -> list[str]:
    return [name for name in (*line["pictures"], f"{line['number']:04d}.txt") if OURS.fullmatch(name)]

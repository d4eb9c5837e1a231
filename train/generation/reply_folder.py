"""The folder of replies: written as they are generated, so that a killed command can be continued.

out/0000.png, 0000-1.png, ...   the images of reply 0, in order
out/0000.txt                    its text, with `<|image|>` in the place of each image
out/results.jsonl               one line per reply, written after its files, in the order of generation
out/request.json                checkpoint, prompts and sampling; replies to another request are replaced
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
REPLY_FILE = re.compile(r"[0-9]{4,}(-[0-9]+)?\.(png|txt)")

JsonObject = dict[str, Any]


def check_reply_folder(folder: Path, inputs: Sequence[Path]) -> None:
    """Check that replies can be written to a folder without touching other files.

    Args:
        folder: created if it is missing.
        inputs: files that are read and must not be replaced.

    Raises:
        ConfigError: it is not writable, holds other files than replies, or one of the inputs.
    """
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
    files = [path.name for path in folder.iterdir() if not path.name.startswith(ASIDE)]
    if files and _read_results(folder) is None:
        raise ConfigError(
            f"{folder}: it holds {min(files)} and no {RESULTS} of replies: name an empty folder"
        )


class ReplyFolder:
    """Writes replies to a folder.

    Args:
        folder: one that passed `check_reply_folder`.
        request: everything that the replies depend on, as JSON.
    """

    def __init__(self, folder: Path, request: JsonObject) -> None:
        self._folder, self._request = folder, request

    def begin(self) -> set[int]:
        """Return the numbers of the finished replies; remove those to another request."""
        results = _read_results(self._folder) or []
        if _read_request(self._folder) == self._request:
            finished = [result for result in results if self._has_pictures(result)]
        else:
            finished = []
            for name in (name for result in results for name in _reply_files(result)):
                (self._folder / name).unlink(missing_ok=True)
        # Rewritten without the incomplete line that a kill may have left. The results are written before the
        # request, which names what they belong to.
        write_aside(self._folder / RESULTS, b"".join(map(_json_line, finished)))
        write_aside(self._folder / REQUEST, _json_line(self._request))
        return {result["number"] for result in finished}

    def _has_pictures(self, result: JsonObject) -> bool:
        return all((self._folder / name).is_file() for name in result["pictures"])

    def add(self, replies: Sequence[tuple[JsonObject, Mapping[str, bytes]]]) -> None:
        """Write replies: for each its line of results.jsonl, and its files by name."""
        for _, files in replies:
            for name, data in files.items():
                write_aside(self._folder / name, data)
        with open(self._folder / RESULTS, "ab") as file:
            file.write(b"".join(_json_line(result) for result, _ in replies))


def _json_line(content: JsonObject) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _read_results(folder: Path) -> list[JsonObject] | None:
    """Return the complete lines of results.jsonl; None if the folder is not one of replies."""
    try:
        *complete, _ = (folder / RESULTS).read_bytes().split(b"\n")
        results = [json.loads(line) for line in complete]
    except (OSError, ValueError):
        return None
    keys = {"number", "prompt", "pictures"}
    return results if all(isinstance(result, dict) and keys <= set(result) for result in results) else None


def _read_request(folder: Path) -> Any:
    try:
        return json.loads((folder / REQUEST).read_bytes())
    except (OSError, ValueError):
        return None


def _reply_files(result: JsonObject) -> list[str]:
    names = [*result["pictures"], f"{result['number']:04d}.txt"]
    return [name for name in names if REPLY_FILE.fullmatch(name)]

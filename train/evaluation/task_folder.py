"""A task's folder: units of work as files, so that any rank can do any unit and a kill loses one at most.

OUT/TASK/request.json           everything that the units depend on; units of another request are removed
OUT/TASK/units/00000.jsonl      the results of a unit, written as a whole: where the file is, it is done
OUT/TASK/pictures/0003.png      drawings by the number of the reply, written before their unit
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError
from unitoken.common.files import ASIDE, write_aside

RESULT = "result.json"  # of the whole suite, beside the folders of its tasks
REQUEST = "request.json"
UNITS = "units"
DRAWINGS = "pictures"

Line = dict[str, Any]  # a reply's or a pack's result


@dataclass(frozen=True)
class UnitWork:
    """A task's work in numbered units, which are the same for any number of ranks.

    Attributes:
        request: everything that the units depend on, as JSON.
        units: how many there are.
        do: gives a unit's lines and the drawings in it, by the names of their files.
    """

    request: dict[str, Any]
    units: int
    do: Callable[[int], tuple[list[Line], dict[str, bytes]]]


class TaskFolder:
    """Reads and writes a task's units.

    Args:
        path: the task's folder.
        request: everything that the units depend on, as JSON.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.path = path
        self._request = json.dumps(request, sort_keys=True).encode() + b"\n"

    def begin(self) -> None:
        """Make the folder, without the units of another request.

        Raises:
            ConfigError: it holds files that are not of an evaluation.
        """
        request = self.path / REQUEST
        self.path.mkdir(parents=True, exist_ok=True)
        others = [path for path in self.path.iterdir() if path != request and not path.name.startswith(ASIDE)]
        if others and not request.is_file():
            raise ConfigError(
                f"{self.path}: it holds {min(others).name} and no {REQUEST} of an evaluation: "
                "name another folder with --out"
            )
        if others and request.read_bytes() != self._request:
            # The old request is replaced after them, so that a kill leaves no units under the new one.
            for path in others:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        write_aside(request, self._request)
        for name in (UNITS, DRAWINGS):
            (self.path / name).mkdir(exist_ok=True)

    def is_begun(self) -> bool:
        """Return whether `begin` was called for this request, by this process or another."""
        request = self.path / REQUEST
        try:
            begun = request.read_bytes() == self._request
        except FileNotFoundError:
            return False
        return begun and all((self.path / name).is_dir() for name in (UNITS, DRAWINGS))

    def has(self, unit: int) -> bool:
        """Return whether a unit is done."""
        return self._file(unit).is_file()

    def add(self, unit: int, lines: Sequence[Line], pictures: Mapping[str, bytes]) -> None:
        """Write a unit: its drawings by the names of their files, then its lines."""
        for name, data in pictures.items():
            write_aside(self.path / DRAWINGS / name, data)
        write_aside(self._file(unit), b"".join(map(_json_line, lines)))

    def lines(self, units: int) -> list[Line]:
        """Return the lines of all units, in their order."""
        return [
            json.loads(line) for unit in range(units) for line in self._file(unit).read_bytes().splitlines()
        ]

    def write(self, name: str, lines: Sequence[Line]) -> None:
        """Write a file of lines beside the units."""
        write_aside(self.path / name, b"".join(map(_json_line, lines)))

    def _file(self, unit: int) -> Path:
        return self.path / UNITS / f"{unit:05d}.jsonl"


def _json_line(line: Line) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"

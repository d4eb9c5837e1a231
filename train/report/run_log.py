"""A run as its report shows it, read from the files in its folder alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from unitoken.common.errors import ConfigError, one_line
from unitoken.train.checkpoint.metadata import STAGE
from unitoken.train.run.log_files import METRICS, Start, read_metrics, read_starts


class Curve(NamedTuple):
    """A measure over the steps of a run."""

    steps: Sequence[float]
    values: Sequence[float]

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]


@dataclass(frozen=True)
class RunLog:
    """What a run has logged.

    Attributes:
        name: the run's folder as it was named.
        folder: where its files lie.
        curves: the measures of its steps by name, as in metrics.jsonl; `tokens_seen/STREAM` for each stream.
        evaluations: measures at an interval, by their group in metrics.jsonl (`eval`) and their name.
        starts: when it started and from which step.
        settings: stage.yaml, each setting under its dotted name.
    """

    name: str
    folder: Path
    curves: Mapping[str, Curve]
    evaluations: Mapping[str, Mapping[str, Curve]]
    starts: Sequence[Start]
    settings: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)


def read_run(folder: Path, name: str) -> RunLog:
    """Read the logs of a run.

    Args:
        folder: the run's folder.
        name: how it is called in the report.

    Raises:
        ConfigError: there is no such folder, or it is not a run's.
    """
    if not folder.is_dir():
        raise ConfigError(f"{name}: no such folder; name the folder of a run, its save.folder")
    if not (folder / METRICS).is_file():
        raise ConfigError(f"{name}: no {METRICS} in it; name the folder of a run, its save.folder")
    curves, evaluations = _read_curves(folder / METRICS)
    return RunLog(name, folder, curves, evaluations, read_starts(folder), _read_settings(folder / STAGE))


def _read_curves(path: Path) -> tuple[dict[str, Curve], dict[str, dict[str, Curve]]]:
    """Return the curves of the steps, and those of evaluations by group; steps are whole and in order."""
    columns: defaultdict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    groups: defaultdict[str, defaultdict[str, tuple[list[float], list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: ([], []))
    )
    for line in read_metrics(path):
        step = line["step"]
        for key, value in line.items():
            if isinstance(value, dict):
                is_of_step = key == "tokens_seen"
                for name, number in value.items():
                    target = columns[f"{key}/{name}"] if is_of_step else groups[key][name]
                    _add(target, step, number)
            elif key != "step":
                _add(columns[key], step, value)
    return _curves(columns), {name: _curves(group) for name, group in groups.items()}


def _add(column: tuple[list[float], list[float]], step: int, value: Any) -> None:
    """Add a number to a column; of a step that stands there already the later value counts."""
    steps, values = column
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return
    while steps and steps[-1] >= step:
        steps.pop()
        values.pop()
    steps.append(step)
    values.append(value)


def _curves(columns: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, Curve]:
    return {name: Curve(*column) for name, column in columns.items() if column[0]}


def _read_settings(path: Path) -> dict[str, Any]:
    """Return a stage's settings by dotted name; none if the file is missing or broken."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error, 200)}") from None
    return dict(_flat(content, "")) if isinstance(content, dict) else {}


def _flat(settings: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat

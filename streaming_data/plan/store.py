"""Plans on this host's disk: made once for all processes, memory-mapped, and compared with their hashes when they are opened."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unitoken.common.files import AsideFolder, locked, remove_abandoned
from unitoken.streaming_data.plan.build import Plan, build, order_of, weights_of
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.report import PlanReport

ARRAYS = ("ids", "offsets", "squares", "images")  # the files of a saved plan
KEPT_SECONDS = 30 * 86400.0  # after its last use; one that is needed again is made again, and is the same


def load_or_build(
    folder: Path, recipe: Recipe, epoch: int, streams: Callable[[], Sequence[StreamSamples]]
) -> Plan:
    """The plan of an epoch, memory-mapped from `folder`; made there first, by one process, where it is missing.

    `streams` is asked for the lengths only where the plan has to be made.
    """
    first = load_or_build(folder, recipe, 0, streams).report if epoch else None
    place = folder / recipe.hash / f"epoch-{epoch:06d}"
    if (plan := _load(place)) is None:
        with locked(folder / recipe.hash / "lock"):
            if (plan := _load(place)) is None:
                _remove_unused(folder)
                if place.exists():
                    print(f"{place}: damaged, so it is made anew", file=sys.stderr, flush=True)
                    shutil.rmtree(place)
                _save(build(recipe, streams(), epoch, first), place)
                plan = _load(place)
                assert plan is not None
    os.utime(place)
    return plan


def _load(place: Path) -> Plan | None:
    """A saved plan; None where there is none, or its files are not those that were saved: one flipped bit would lose a sample
    and repeat another.
    """
    try:
        report = PlanReport.model_validate_json((place / "report.json").read_bytes())
        mapped = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        changed = tuple((place / f"{name}.npy").stat().st_mtime_ns for name in ARRAYS)
    except (OSError, ValueError, EOFError):
        return None
    plan = Plan(
        report=report, **{name: np.asarray(array) for name, array in mapped.items()}
    )  # memmap's own slices are slow
    return plan if _is_whole(str(place), changed, plan) else None


_whole: set[tuple[str, tuple[int, ...], str]] = (
    set()
)  # what this process has compared: 0.4 s for 100 M samples


def _is_whole(place: str, changed: tuple[int, ...], plan: Plan) -> bool:
    key = place, changed, plan.report.model_dump_json()
    if key not in _whole:
        report = plan.report
        if (order_of(plan.ids, plan.offsets), plan.packs) != (report.order, report.packs):
            return False
        if report.weights is not None and weights_of(plan.squares, plan.images) != report.weights:
            return False
        if not len(plan.squares) == len(plan.images) == plan.packs:
            return False
        _whole.add(key)
    return True


def _remove_unused(folder: Path) -> None:
    for recipe in folder.iterdir():
        remove_abandoned(recipe)  # what killed builders left
    for place in folder.glob("*/epoch-*"):
        with contextlib.suppress(FileNotFoundError):  # by another process
            if time.time() - place.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(place)


def _save(plan: Plan, place: Path) -> None:
    with AsideFolder(place) as folder:
        for name in ARRAYS:
            np.save(folder.path / f"{name}.npy", getattr(plan, name))
        (folder.path / "report.json").write_text(plan.report.model_dump_json(indent=1))
        folder.publish()

"""Plans on this host's disk: made once for all processes, memory-mapped, and verified when opened."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unitoken.common.files import AsideFolder, locked, remove_abandoned
from unitoken.streaming_data.plan.build import Plan, build, order_hash, weights_hash
from unitoken.streaming_data.plan.lengths import StreamSamples
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.plan.report import PlanReport

log = logging.getLogger(__name__)

ARRAYS = ("ids", "offsets", "squares", "images")  # the files of a saved plan
KEPT_SECONDS = 30 * 86400.0  # after its last use; a plan that is needed again is made again, and is the same


def load_or_build(
    folder: Path, recipe: Recipe, epoch: int, read_streams: Callable[[], Sequence[StreamSamples]]
) -> Plan:
    """Return the plan of an epoch, memory-mapped from `folder`; one process makes it there if it is missing.

    Args:
        folder: of all plans on this host.
        recipe: the plan's.
        epoch: from 0.
        read_streams: returns the samples of each stream; called only if the plan has to be made.
    """
    first = load_or_build(folder, recipe, 0, read_streams).report if epoch else None
    place = folder / recipe.hash / f"epoch-{epoch:06d}"
    plan = _load(place)
    if plan is None:
        with locked(folder / recipe.hash / "lock"):
            plan = _load(place)  # another process may have made it
            if plan is None:
                _remove_unused(folder)
                if place.exists():
                    log.warning("%s: damaged, so it is made anew", place)
                    shutil.rmtree(place)
                _save(build(recipe, read_streams(), epoch, first), place)
                plan = _load(place)
                assert plan is not None
    os.utime(place)
    return plan


def _load(place: Path) -> Plan | None:
    """Return a saved plan; None if there is none or a file was changed: a flipped bit may lose a sample."""
    try:
        report = PlanReport.model_validate_json((place / "report.json").read_bytes())
        mapped = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        times = tuple((place / f"{name}.npy").stat().st_mtime_ns for name in ARRAYS)
    except (OSError, ValueError, EOFError):
        return None
    arrays = {name: np.asarray(array) for name, array in mapped.items()}  # slicing a memmap is slow
    plan = Plan(report=report, **arrays)
    return plan if _is_whole(str(place), times, plan) else None


# What this process has verified, by place, times of change and report: it takes 0.4 s for 100 M samples.
_whole: set[tuple[str, tuple[int, ...], str]] = set()


def _is_whole(place: str, times: tuple[int, ...], plan: Plan) -> bool:
    """Return whether a plan's arrays have the hashes and the lengths that its report names."""
    key = place, times, plan.report.model_dump_json()
    if key not in _whole:
        report = plan.report
        if (order_hash(plan.ids, plan.offsets), plan.packs) != (report.order, report.packs):
            return False
        if report.weights is not None and weights_hash(plan.squares, plan.images) != report.weights:
            return False
        if not len(plan.squares) == len(plan.images) == plan.packs:
            return False
        _whole.add(key)
    return True


def _remove_unused(folder: Path) -> None:
    for recipe in folder.iterdir():
        remove_abandoned(recipe)  # left by killed builders
    for place in folder.glob("*/epoch-*"):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it, too
            if time.time() - place.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(place)


def _save(plan: Plan, place: Path) -> None:
    with AsideFolder(place) as folder:
        for name in ARRAYS:
            np.save(folder.path / f"{name}.npy", getattr(plan, name))
        (folder.path / "report.json").write_text(plan.report.model_dump_json(indent=1))
        folder.publish()

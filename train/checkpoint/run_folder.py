"""A run's folder: `step-00000100.pt`, ..., and `latest`, a link to the newest of them.

Checkpoints are Composer's, whole (not sharded), so any number of ranks can go on from them. Each is written aside and
renamed, and `latest` is replaced in one step: whenever the run is killed, `latest` names a whole checkpoint. They are read
with `weights_only=True`: a checkpoint from elsewhere can not run code.

Saving the 7B model with its optimizer takes 84 GB of memory on the first rank's host, and as much disk.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unitoken.common.errors import ConfigError
from unitoken.common.files import aside, remove_abandoned
from unitoken.train.checkpoint.integrity import check_finite, damage
from unitoken.train.checkpoint.layouts import LATEST, STEP, latest_checkpoint
from unitoken.train.checkpoint.tensors import Shapes, Tensors, TensorSource, check_shapes, decoder_source

LOCK = ".lock"
NETWORK = "network."  # what the names of our model's tensors begin with in a checkpoint
SAFE_TYPES = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,  # a kind of str
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
]  # fmt: skip


def allow_safe_types() -> None:
    """What a checkpoint holds beside tensors and plain values: times, and numpy's random state."""
    torch.serialization.add_safe_globals(SAFE_TYPES)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def unpublished(folder: Path, step: int) -> Path:
    """Where it is written first; the same name on all ranks."""
    return folder / f".aside-step-{step:08d}.pt"


def step_of(checkpoint: Path) -> int:
    match = STEP.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint}: not named like a checkpoint (step-00000100.pt)")
    return int(match[1])


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Composer's state; tensors stay on disk until they are used."""
    allow_safe_types()
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state"]
        assert isinstance(state["model"], dict)
    except Exception as error:  # torch raises a dozen kinds for a file that is no checkpoint
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it holds a {unsafe[1]}, which could run code"
            if unsafe
            else (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise ConfigError(f"{checkpoint}: not a checkpoint of this program: {why}") from None
    return dict(state)


def id_of(checkpoint: Path) -> str | None:
    """What tells it from all others, of other runs too; None where it is older than ids."""
    found: str | None = _saved_by(read_checkpoint(checkpoint)).get("id")
    return found


def unfinished(checkpoint: Path) -> str | None:
    """`step 4 of 9 of that stage`; None at a stage's end, and where the checkpoint does not say."""
    state = read_checkpoint(checkpoint)
    total = _saved_by(state).get("total_steps")
    step = state["timestamp"]["Timestamp"]["batch"] if total else 0  # its name may be another's
    return f"step {step} of {total} of that stage" if total and step < total else None


def _saved_by(state: dict[str, Any]) -> dict[str, Any]:
    return dict(state.get("callbacks", {}).get("Saver", {}))


def _network(state: dict[str, Any]) -> Tensors:
    return {
        name.removeprefix(NETWORK): tensor
        for name, tensor in state["model"].items()
        if isinstance(tensor, Tensor)
    }


def source_of(checkpoint: Path) -> TensorSource:
    """The model's weights in a checkpoint."""
    shapes: Shapes = {
        name: tuple(tensor.shape) for name, tensor in _network(read_checkpoint(checkpoint)).items()
    }
    return TensorSource(str(checkpoint), shapes, lambda names: _copies(checkpoint, names))


def _copies(checkpoint: Path, names: Collection[str]) -> Tensors:
    tensors = _network(read_checkpoint(checkpoint))
    copies = {name: tensors[name].clone() for name in names}
    check_finite(copies.items(), str(checkpoint))
    return copies


def open_source(origin: Path) -> TensorSource:
    """The weights that `find_origin` found, whichever form they are in."""
    return decoder_source(str(origin)) if origin.is_dir() else source_of(origin)


def check_resumable(checkpoint: Path, expected: Shapes, stage: dict[str, Any]) -> None:
    """Composer would load what fits and say nothing of the rest. Raises ConfigError where the checkpoint is not this stage's."""
    state = read_checkpoint(checkpoint)
    saved = _saved_by(state)
    for key, value in stage.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"save.folder: {checkpoint} was saved by a stage with `{key}` {saved.get(key)!r}, this one has {value!r}; "
                "give each stage a folder of its own"
            )
    check_shapes(
        {name: tuple(tensor.shape) for name, tensor in _network(state).items()}, expected, str(checkpoint)
    )


def set_aside_damaged(folder: Path) -> list[str]:
    """Rename the newest checkpoint while it is damaged, so that the run goes on from the one before, which gives the same losses.

    Returns:
        What was done, in lines.

    Raises:
        ConfigError: none is whole. To begin anew is for the user to say, by removing them.
    """
    lines: list[str] = []
    while (checkpoint := latest_checkpoint(folder)) is not None and (found := damage(checkpoint)) is not None:
        before = [
            path
            for path in sorted(folder.glob("step-*.pt"))
            if STEP.fullmatch(path.name) and path != checkpoint
        ]
        if not before:
            raise ConfigError(
                f"{checkpoint}: damaged: {found}; there is no other to go on from: remove it to begin anew"
            )
        _point_to(before[-1])
        checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))
        lines.append(
            f"{checkpoint}: damaged: {found}; renamed to damaged-{checkpoint.name}; goes on from {before[-1].name}"
        )
    return lines


def _point_to(checkpoint: Path) -> None:
    """Let `latest` name it."""
    link = aside(checkpoint.parent / LATEST)
    link.symlink_to(checkpoint.name)
    os.replace(link, checkpoint.parent / LATEST)


def publish_checkpoint(written: Path, checkpoint: Path, keep: int) -> None:
    """Give a finished file its name, point `latest` at it, and delete all but the newest `keep`."""
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, checkpoint)
    folder = checkpoint.parent
    _point_to(checkpoint)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        if old != checkpoint:
            old.unlink()


def clean_up(folder: Path) -> None:
    """Remove what a killed run was writing."""
    remove_abandoned(folder)
    for left in folder.glob(".aside-step-*.pt"):  # by torch, unlocked: there is one run a folder
        left.unlink()

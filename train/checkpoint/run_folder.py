"""A run's folder: `step-00000100.pt`, ..., and `latest`, a link to the newest of them.

Checkpoints are Composer's, whole and not sharded, so any number of ranks can resume from them. Each is
written aside and renamed, and `latest` is replaced atomically: whenever the run is killed, `latest` names a
whole checkpoint. They are read with `weights_only=True`: a checkpoint from elsewhere can not run code.

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
from unitoken.train.checkpoint.integrity import check_finite, find_damage
from unitoken.train.checkpoint.locations import LATEST, STEP, latest_checkpoint
from unitoken.train.checkpoint.tensors import (
    Shapes,
    Tensors,
    TensorSource,
    check_shapes,
    open_decoder_folder,
)
from unitoken.train.config import is_adapter
from unitoken.train.model.lora import merged_weight

LOCK = ".lock"
NETWORK = "network."  # the prefix of our model's tensors in a checkpoint
# What a checkpoint holds beside tensors and plain values: times, and numpy's random state.
SAFE_TYPES = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,  # a kind of str
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
]  # fmt: skip


def allow_safe_types() -> None:
    """Let torch read `SAFE_TYPES` with `weights_only=True`."""
    torch.serialization.add_safe_globals(SAFE_TYPES)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return folder / f"step-{step:08d}.pt"


def temporary_path(folder: Path, step: int) -> Path:
    """Return the path at which a step's checkpoint is written first; the same on all ranks."""
    return folder / f".aside-step-{step:08d}.pt"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name. Raises ConfigError for another name."""
    match = STEP.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"{checkpoint}: not named like a checkpoint (step-00000100.pt)")
    return int(match[1])


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return Composer's state, whose tensors stay on disk until they are used.

    Raises:
        ConfigError: not a checkpoint of this program, or one that could run code.
    """
    allow_safe_types()
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state"]
        assert isinstance(state["model"], dict)
    except Exception as error:  # torch raises a dozen kinds for a file that is not a checkpoint
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            reason = f"it holds a {unsafe[1]}, which could run code"
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{checkpoint}: not a checkpoint of this program: {reason}") from None
    return dict(state)


def checkpoint_id(checkpoint: Path) -> str | None:
    """Return a checkpoint's id, unique among all runs; None if it is older than ids."""
    identity: str | None = _saver_state(read_checkpoint(checkpoint)).get("id")
    return identity


def describe_unfinished(checkpoint: Path) -> str | None:
    """Return "step 4 of 9 of that stage"; None at the end of a stage, or if its length is unknown."""
    state = read_checkpoint(checkpoint)
    total = _saver_state(state).get("total_steps")
    if not total:
        return None
    step = state["timestamp"]["Timestamp"]["batch"]  # not from the name: the file may have been renamed
    return f"step {step} of {total} of that stage" if step < total else None


def _saver_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the callback `Saver`."""
    return dict(state.get("callbacks", {}).get("Saver", {}))


def _network_tensors(state: dict[str, Any]) -> Tensors:
    """Return our model's tensors under our names."""
    return {
        name.removeprefix(NETWORK): tensor
        for name, tensor in state["model"].items()
        if isinstance(tensor, Tensor)
    }


def _shapes(tensors: Tensors) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def open_checkpoint(checkpoint: Path) -> TensorSource:
    """Open the model's weights in a checkpoint, with its adapters merged into them."""
    state = read_checkpoint(checkpoint)
    lora = _saver_state(state).get("lora")
    scale = lora["alpha"] / lora["rank"] if lora else 0.0

    def read(names: Collection[str]) -> Tensors:
        tensors = _network_tensors(read_checkpoint(checkpoint))
        copies = {name: merged_weight(name, tensors, scale) for name in names}
        check_finite(copies.items(), str(checkpoint))
        return copies

    tensors = {name: tensor for name, tensor in _network_tensors(state).items() if not is_adapter(name)}
    return TensorSource(str(checkpoint), _shapes(tensors), read)


def open_weights(origin: Path) -> TensorSource:
    """Open the weights that `find_origin` found: a checkpoint file or a folder of Hugging Face's layout."""
    return open_decoder_folder(str(origin)) if origin.is_dir() else open_checkpoint(origin)


def check_resumable(checkpoint: Path, expected: Shapes, stage: dict[str, Any]) -> None:
    """Check that a checkpoint is of this stage and model: Composer would load what fits and ignore the rest.

    Args:
        checkpoint: the checkpoint to resume from.
        expected: the shapes of the model's parameters.
        stage: what identifies the stage, as `Saver` keeps it in checkpoints.

    Raises:
        ConfigError: it is of another stage, or its tensors do not fit.
    """
    state = read_checkpoint(checkpoint)
    saved = _saver_state(state)
    for key, value in stage.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"save.folder: {checkpoint} was saved by a stage with `{key}` {saved.get(key)!r}, "
                f"this one has {value!r}; give each stage a folder of its own"
            )
    check_shapes(_shapes(_network_tensors(state)), expected, str(checkpoint))


def set_aside_damaged(folder: Path) -> list[str]:
    """Rename damaged checkpoints, newest first, so that the run resumes from an older one.

    Resuming from an older checkpoint gives the same losses.

    Returns:
        A line about each renamed checkpoint.

    Raises:
        ConfigError: no checkpoint is whole. Only the user may start the run again, by removing them.
    """
    lines: list[str] = []
    while True:
        checkpoint = latest_checkpoint(folder)
        damage = find_damage(checkpoint) if checkpoint is not None else None
        if checkpoint is None or damage is None:
            return lines
        saved = sorted(path for path in folder.glob("step-*.pt") if STEP.fullmatch(path.name))
        others = [path for path in saved if path != checkpoint]
        if not others:
            raise ConfigError(
                f"{checkpoint}: damaged: {damage}; there is no other to resume from: remove it to start again"
            )
        _set_latest(others[-1])
        checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))
        lines.append(
            f"{checkpoint}: damaged: {damage}; renamed to damaged-{checkpoint.name}; "
            f"resumes from {others[-1].name}"
        )


def _set_latest(checkpoint: Path) -> None:
    """Make `latest` a link to a checkpoint."""
    link = aside(checkpoint.parent / LATEST)
    link.symlink_to(checkpoint.name)
    os.replace(link, checkpoint.parent / LATEST)


def publish_checkpoint(written: Path, checkpoint: Path, keep: int) -> None:
    """Give a written checkpoint its name, make it the latest, and delete all but the newest checkpoints.

    Args:
        written: the complete file, at its temporary path.
        checkpoint: its final path.
        keep: how many checkpoints to keep.
    """
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, checkpoint)
    folder = checkpoint.parent
    _set_latest(checkpoint)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        if old != checkpoint:
            old.unlink()


def remove_partial_files(folder: Path) -> None:
    """Remove the files that a killed run was writing."""
    remove_abandoned(folder)
    # Torch writes checkpoints without a lock; no other run writes to this folder.
    for partial in folder.glob(".aside-step-*.pt"):
        partial.unlink()

"""A run's folder: `step-00000100`, ..., and `latest`, a link to the newest of them.

Each rank writes the rows that it holds, and any number of ranks can resume from them (sharded.py). The index
is written last, and `latest` is replaced atomically after it: whenever the run is killed, `latest` names a
complete checkpoint. Runs of before have whole files of Composer's, `step-00000100.pt`, which are read with
`weights_only=True`: no checkpoint from elsewhere can run code.

A checkpoint of the 7B model with its optimizer takes 84 GB of disk.
"""

from __future__ import annotations

import contextlib
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
from unitoken.common.files import aside, remove_abandoned, write_aside
from unitoken.train.checkpoint.integrity import check_finite, find_damage
from unitoken.train.checkpoint.locations import (
    INDEX,
    LATEST,
    STEP,
    complete_checkpoints,
    is_checkpoint,
    latest_checkpoint,
)
from unitoken.train.checkpoint.sharded import ShardedCheckpoint
from unitoken.train.checkpoint.sharded_index import RANK_FILE
from unitoken.train.checkpoint.tensors import (
    Shapes,
    Tensors,
    TensorSource,
    check_shapes,
    open_decoder_folder,
)
from unitoken.train.config import is_adapter
from unitoken.train.model.lora import merged_weight

NETWORK = "network."  # the prefix of our model's tensors in a whole-file checkpoint
# What such a checkpoint holds beside tensors and plain values: times, and numpy's random state.
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
    return folder / f"step-{step:08d}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return Composer's state; that of a whole-file checkpoint has the tensors, too. Raises ConfigError."""
    return ShardedCheckpoint(checkpoint).state if checkpoint.is_dir() else read_whole_file(checkpoint)


def read_whole_file(checkpoint: Path) -> dict[str, Any]:
    """Return Composer's state from a `step-*.pt`, whose tensors stay on disk until they are used.

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
    identity: str | None = _saver_state(read_state(checkpoint)).get("id")
    return identity


def describe_unfinished(checkpoint: Path) -> str | None:
    """Return "step 4 of 9 of that stage"; None at the end of a stage, or if its length is unknown."""
    state = read_state(checkpoint)
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
    tensors = _open_tensors(checkpoint)
    lora = _saver_state(read_state(checkpoint)).get("lora")
    return _merge_adapters(tensors, lora["alpha"] / lora["rank"]) if lora else tensors


def _open_tensors(checkpoint: Path) -> TensorSource:
    """Open all parameters in a checkpoint."""
    if checkpoint.is_dir():
        return ShardedCheckpoint(checkpoint).weights()

    tensors = _network_tensors(read_whole_file(checkpoint))  # which stay on disk

    def read(names: Collection[str]) -> Tensors:
        copies = {name: tensors[name].clone() for name in names}
        check_finite(copies.items(), str(checkpoint))
        return copies

    return TensorSource(str(checkpoint), _shapes(tensors), read)


def _merge_adapters(source: TensorSource, scale: float) -> TensorSource:
    """Return the weights with their adapters added, whose outputs are multiplied by `scale`."""
    adapters = {name for name in source.shapes if is_adapter(name)}

    def read(names: Collection[str]) -> Tensors:
        layers = {name.removesuffix("weight") for name in names}
        needed = [name for name in adapters if name.removesuffix("lora_a").removesuffix("lora_b") in layers]
        tensors = source.read([*names, *needed])
        return {name: merged_weight(name, tensors, scale) for name in names}

    shapes = {name: shape for name, shape in source.shapes.items() if name not in adapters}
    return TensorSource(source.where, shapes, read)


def open_weights(origin: Path) -> TensorSource:
    """Open the weights that `find_origin` found: a checkpoint or a folder of Hugging Face's layout."""
    return open_checkpoint(origin) if is_checkpoint(origin) else open_decoder_folder(str(origin))


def check_resumable(checkpoint: Path, expected: Shapes, stage: dict[str, Any]) -> None:
    """Check that a checkpoint is of this stage and model: Composer would load what fits and ignore the rest.

    Args:
        checkpoint: the checkpoint to resume from.
        expected: the shapes of the model's parameters.
        stage: what identifies the stage, as `Saver` keeps it in checkpoints.

    Raises:
        ConfigError: it is of another stage, or its tensors do not fit.
    """
    saved = _saver_state(read_state(checkpoint))
    for key, value in stage.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"save.folder: {checkpoint} was saved by a stage with `{key}` {saved.get(key)!r}, "
                f"this one has {value!r}; give each stage a folder of its own"
            )
    check_shapes(_open_tensors(checkpoint).shapes, expected, str(checkpoint))


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
        others = [path for path in complete_checkpoints(folder) if path != checkpoint]
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
    latest = checkpoint.parent / LATEST
    if latest.is_dir() and not latest.is_symlink():
        _delete(latest)  # a copy of the run, in which it is a second copy of a checkpoint
    link = aside(latest)
    link.symlink_to(checkpoint.name)
    os.replace(link, latest)


def publish_checkpoint(checkpoint: Path, index: bytes, keep: int) -> None:
    """Complete a checkpoint with its index, make it the latest, and delete all but the newest checkpoints.

    Args:
        checkpoint: the folder of the checkpoint, which holds the files of all ranks.
        index: the content of its index.
        keep: how many checkpoints to keep.
    """
    write_aside(checkpoint / INDEX, index)
    _set_latest(checkpoint)
    for old in complete_checkpoints(checkpoint.parent)[:-keep]:
        if old != checkpoint:
            _delete(old)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill in between leaves an incomplete one."""
    if checkpoint.is_file():
        checkpoint.unlink()
    else:
        (checkpoint / INDEX).unlink(missing_ok=True)
        for path in checkpoint.iterdir():
            if re.fullmatch(RANK_FILE, path.name):
                path.unlink()
        with contextlib.suppress(OSError):  # what else is in it is the user's
            checkpoint.rmdir()


def remove_partial_files(folder: Path) -> None:
    """Remove the files that a killed run was writing, and incomplete checkpoints."""
    remove_abandoned(folder)
    for path in folder.glob("step-*"):
        if STEP.fullmatch(path.name) and path.is_dir() and not is_checkpoint(path):
            remove_abandoned(path)
            _delete(path)
    for partial in folder.glob(".aside-step-*.pt"):  # of versions that wrote whole files
        partial.unlink()

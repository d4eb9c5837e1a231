"""Checkpoints as a run writes them, of a few given tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitoken.train.checkpoint.plain_values import to_plain
from unitoken.train.checkpoint.sharded import (
    WEIGHTS,
    HeldRows,
    ShardedCheckpoint,
    build_index,
    rank_file,
    write_pieces,
)
from unitoken.train.run.run_folder import NETWORK, checkpoint_path, publish_checkpoint


def write_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Tensor], *, keep: int = 2, ranks: int = 1, **state: Any
) -> Path:
    """Write a checkpoint as so many ranks do, each of which holds its share of the rows."""
    folder.mkdir(exist_ok=True)
    checkpoint = checkpoint_path(folder, step)
    parts = [
        write_pieces(rank_file(checkpoint, rank, ranks), share(weights, rank, ranks)) for rank in range(ranks)
    ]
    publish_checkpoint(checkpoint, build_index(parts, to_plain(state)), keep)
    return checkpoint


def share(weights: Mapping[str, Tensor], rank: int, ranks: int) -> list[HeldRows]:
    """The rows of weights that a rank holds, as FSDP2 gives them."""
    pieces = []
    for name, tensor in weights.items():
        each = math.ceil(len(tensor) / ranks)
        first = min(rank * each, len(tensor))
        pieces.append(HeldRows(f"{WEIGHTS}{name}", tuple(tensor.shape), first, tensor[first : first + each]))
    return pieces


def write_whole_file(folder: Path, step: int, weights: Mapping[str, Tensor], **state: Any) -> Path:
    """Write a checkpoint as runs of before have them."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    model = {f"{NETWORK}{name}": tensor for name, tensor in weights.items()}
    torch.save({"state": {"model": model, **state}}, path)
    return path


def all_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `model/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`."""
    saved = ShardedCheckpoint(checkpoint)
    return {name: saved.read(name) for name in saved.tensors}

"""The state of a run for sharded checkpoints: the rows that each rank holds, and what Composer keeps.

FSDP2 gives the ranks of a group equal shards of the rows of each parameter, of which the last may be shorter
or empty. With replicas each writes a part of the tensors, in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer import State, Trainer
from composer.utils import reproducibility
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from unitoken.train.checkpoint.plain_values import to_plain
from unitoken.train.checkpoint.sharded import WEIGHTS, HeldRows, ShardedCheckpoint

TENSORS = ("model", "optimizers")  # the parts of Composer's state that are written as rows


def loop_state(state: State) -> dict[str, Any]:
    """Return all state but the tensors, as JSON: what Composer keeps, and the random numbers of all ranks.

    All ranks have to call it.
    """
    _reshard(state)
    attributes = state.serialized_attributes
    state.serialized_attributes = [name for name in attributes if name not in TENSORS]
    try:
        found: dict[str, Any] = state.state_dict()
    finally:
        state.serialized_attributes = attributes
    # As JSON at once: callbacks go on to change what they have returned.
    encoded: dict[str, Any] = to_plain(
        {**found, "rng": reproducibility.get_rng_state(), "optimizer": _optimizer_state(state)}
    )
    return encoded


def _optimizer_state(state: State) -> dict[str, Any]:
    """Return the optimizer's settings by group, and its numbers by parameter, such as the steps of each."""
    optimizer, names = state.optimizers[0], _names(state)
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    numbers = {
        names[parameter]: {key: float(value) for key, value in values.items() if value.ndim == 0}
        for parameter, values in optimizer.state.items()
    }
    return {"param_groups": groups, "numbers": numbers}


def _reshard(state: State) -> None:
    """Free gathered weights, so that parameters are shards: a forward pass without gradients keeps some."""
    for module in state.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _names(state: State) -> dict[Tensor, str]:
    """Return our name of each parameter."""
    return {parameter: name for name, parameter in state.model.network.named_parameters()}


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and moments of the run, in an order that is the same on all ranks."""
    optimizer = state.optimizers[0]
    for name, parameter in state.model.network.named_parameters():
        yield f"{WEIGHTS}{name}", parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if value.ndim:
                yield f"{key}/{name}", value


def own_pieces(state: State) -> list[HeldRows]:
    """Return the rows of weights and moments that this rank writes, still in the memory of the run."""
    _reshard(state)
    pieces = []
    for number, (name, tensor) in enumerate(_tensors(state)):
        replica, replicas = _replica(tensor)
        if number % replicas == replica:
            first, rows = local_rows(tensor.detach())
            pieces.append(HeldRows(name, tuple(tensor.shape), first, rows))
    return pieces


def local_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """Return the number of this rank's first row of a tensor, and its rows, which share its memory."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    first = 0
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            assert placement.is_shard(0), "FSDP2 shards rows"
            each = math.ceil(tensor.shape[0] / tensor.device_mesh.size(dimension))
            first = min(each * tensor.device_mesh.get_local_rank(dimension), tensor.shape[0])
    return first, tensor.to_local()


def _replica(tensor: Tensor) -> tuple[int, int]:
    """Return which of how many equal copies of a tensor this rank belongs to."""
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                return tensor.device_mesh.get_local_rank(dimension), tensor.device_mesh.size(dimension)
    return 0, 1


class HostCopies:
    """Copies of pieces in this host's memory, which is allocated once and used for every checkpoint."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, pieces: list[HeldRows]) -> list[HeldRows]:
        """Return copies of the pieces, for which the copies of the call before are overwritten."""
        copies = []
        for piece in pieces:
            memory = self._memory.get(piece.name)
            if memory is None:
                memory = self._memory[piece.name] = torch.empty_like(piece.rows, device="cpu")
            copies.append(piece._replace(rows=memory.copy_(piece.rows)))
        return copies


@torch.no_grad()
def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Load a sharded checkpoint into a trainer that was built without one; each rank reads its own rows.

    As Composer, which loads whole files: the run goes on at its step, and random numbers are restored at the
    first batch. The settings of the optimizer's groups stay those of the trainer.

    Args:
        trainer: the trainer, its model sharded; what its parameters hold is overwritten.
        checkpoint: the folder.
    """
    saved = ShardedCheckpoint(checkpoint)
    state, run_name = trainer.state, trainer.state.run_name
    optimizer, names = state.optimizers[0], _names(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[parameter] in saved.state["optimizer"]["numbers"]:
                optimizer.state[parameter] = _moments(saved, names[parameter], parameter, group)
    for name, parameter in state.model.network.named_parameters():
        _read_into(saved, f"{WEIGHTS}{name}", parameter)
    state.load_state_dict(
        {name: value for name, value in saved.state.items() if name not in ("rng", "optimizer")},
        trainer.logger,
    )
    state.run_name = run_name
    trainer._rng_state = saved.state["rng"]
    reproducibility.seed_all(state.seed)


def _moments(
    saved: ShardedCheckpoint, name: str, parameter: Tensor, group: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what the optimizer keeps of a parameter."""
    # Where AdamW itself puts its number of steps.
    on_device = group.get("fused") or group.get("capturable")
    values = {
        key: torch.tensor(number, device=parameter.device if on_device else "cpu")
        for key, number in saved.state["optimizer"]["numbers"][name].items()
    }
    for key in [tensor.removesuffix(f"/{name}") for tensor in saved.tensors if tensor.endswith(f"/{name}")]:
        if f"{key}/" != WEIGHTS:
            values[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            _read_into(saved, f"{key}/{name}", values[key])
    return values


def _read_into(saved: ShardedCheckpoint, name: str, tensor: Tensor) -> None:
    """Fill this rank's rows of a tensor."""
    first, rows = local_rows(tensor.detach())
    if rows.device.type == "cpu" and rows.is_contiguous():
        saved.read_rows(name, first, rows)
    else:
        read = torch.empty(rows.shape, dtype=rows.dtype)
        saved.read_rows(name, first, read)
        rows.copy_(read)

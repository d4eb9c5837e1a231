"""Which parameters are trained, in which groups of the optimizer, and at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unitoken.common.errors import ConfigError
from unitoken.train.config import (
    LORA,
    ROWS,
    VOCABULARY_MATRICES,
    OptimizerConfig,
    TrainedRows,
    is_adapter,
)

# SigLIP's patch and position embeddings stay frozen, as in the reference, unless they are named explicitly.
FROZEN = "vit.embeddings"


def matches(entry: str, parameter: str) -> bool:
    """Return whether an entry of a setting names a parameter or a module that holds it."""
    if entry == LORA:
        return is_adapter(parameter)
    return parameter == entry or parameter.startswith(f"{entry}.")


def freeze(model: nn.Module, trainable: Sequence[str]) -> list[str]:
    """Freeze all parameters but those that `trainable` names.

    Args:
        model: the model.
        trainable: names of parameters or modules. `vit` trains the tower without `vit.embeddings`, which only
            entries that begin with `vit.embeddings` train. `new_rows` and `image_rows` train the vocabulary's
            matrices, of which `keep_old_rows` then leaves all other rows as they are. `lora` trains adapters.

    Returns:
        The names of the trained parameters.

    Raises:
        ConfigError: an entry that names nothing, or only parameters that stay frozen.
    """
    unused = set(trainable)
    trained = []
    for name, parameter in model.named_parameters():
        matching = {entry for entry in trainable if matches(entry, name)}
        if name.startswith(f"{FROZEN}."):
            matching = {entry for entry in matching if entry.startswith(FROZEN)}
        if name in VOCABULARY_MATRICES:
            matching |= {entry for entry in trainable if entry in ROWS}
        unused -= matching
        parameter.requires_grad_(bool(matching))
        if matching:
            trained.append(name)
    if unused:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(
            f"trainable: '{sorted(unused)[0]}' names no parameter of the model; its parts are {parts}"
        )
    return trained


def count_trained(model: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, compat: bool = False, rows: TrainedRows | None = None
) -> torch.optim.AdamW:
    """Build AdamW with a group for each entry of `lr_scales` and one for the rest.

    Norms and biases are in groups of their own without weight decay, as decay would pull their gains to zero.
    Each group carries its `name` and `lr_scale`; see `keep_old_rows` for a group of which some rows train.

    Not Composer's DecoupledAdamW: it does not multiply the decay by the learning rate, so that 0.1 would
    shrink the weights by a tenth each step.

    Args:
        model: the model; its frozen parameters are left out.
        config: the settings. Entries of `lr_scales` name parameters as `trainable` does; the longest match
            wins.
        compat: decay all parameters, as in the reference.
        rows: the only rows of the vocabulary's matrices to train; None trains all.

    Raises:
        ConfigError: an entry of `lr_scales` that names no trained parameter.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    matrices = []
    for name, parameter in model.named_parameters():
        if rows is not None and name in VOCABULARY_MATRICES:
            matrices.append(parameter)
        elif parameter.requires_grad:
            matching = [entry for entry in config.lr_scales if matches(entry, name)]
            decays = compat or not ("norm" in name or name.endswith("bias"))
            groups.setdefault((max(matching, key=len, default="rest"), decays), []).append(parameter)
    built = []
    if rows is not None:
        # AdamW would decay all rows: `decay_new_rows` decays these instead.
        kept = {"first_row": rows.first, "end_row": rows.end, "row_decay": config.weight_decay}
        built = [_group(matrices, rows.name, config, weight_decay=0.0) | kept]
    unused = set(config.lr_scales) - {name for name, _ in groups} - {group["name"] for group in built}
    if unused:
        raise ConfigError(f"optimizer.lr_scales: '{sorted(unused)[0]}' names no parameter that is trained")
    order = [*config.lr_scales, "rest"]
    for name, decays in sorted(groups, key=lambda key: (order.index(key[0]), not key[1])):
        built.append(_group(groups[name, decays], name, config, decays * config.weight_decay))
    return torch.optim.AdamW(
        built,
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        # One kernel for a group, also of sharded parameters. On two CPU cores a step of 135 million
        # parameters takes 0.13 s, and 0.45 s by `foreach`, which reads and writes everything a dozen times.
        fused=True,
    )


def _group(
    parameters: Sequence[nn.Parameter], name: str, config: OptimizerConfig, weight_decay: float
) -> dict[str, Any]:
    return {
        "params": parameters,
        "name": name,
        "lr_scale": config.lr_scales.get(name, 1.0),
        "lr": 0.0,
        "weight_decay": weight_decay,
    }


def place_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Move each parameter's count of steps to its device, where the fused kernel reads it.

    In checkpoints of before `fused` it was on the CPU, and torch leaves it where the checkpoint had it.
    """
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device)


@torch.no_grad()
def keep_old_rows(optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients of all rows of the vocabulary's matrices but the `TrainedRows`.

    Called before gradients are measured and clipped. Without gradients the moments of these rows stay 0, and
    AdamW without decay adds 0 to the rows.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if "first_row" in group else ():
            if parameter.grad is not None:
                gradient, rows = _local(parameter.grad), _local_rows(parameter, group)
                gradient[: rows.start] = 0.0
                gradient[rows.stop :] = 0.0


@torch.no_grad()
def decay_new_rows(optimizer: torch.optim.Optimizer) -> None:
    """Decay the rows that `keep_old_rows` leaves to train, as AdamW's step decays whole parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if "first_row" in group else ():
            if parameter.grad is not None:
                rows = _local(parameter)[_local_rows(parameter, group)]
                rows.mul_(1 - group["lr"] * group["row_decay"])


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_rows(parameter: Tensor, group: dict[str, Any]) -> slice:
    """Return the trained rows of this rank's shard of a parameter.

    FSDP2 gives the ranks of a group equal shards of rows, of which the last may be shorter or empty.
    """
    offset = 0
    if isinstance(parameter, DTensor):
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard():
                ranks = parameter.device_mesh.size(dimension)
                each = math.ceil(parameter.shape[0] / ranks)
                offset = each * parameter.device_mesh.get_local_rank(dimension)
    return slice(max(group["first_row"] - offset, 0), max(group["end_row"] - offset, 0))


def learning_rate(done: float, config: OptimizerConfig, warmup: float, total: float) -> float:
    """Return the learning rate: linear from 0 over the warmup, then by the schedule down to `min_lr`.

    The first step has a learning rate of 0.

    Args:
        done: how far the run is. This and the next two are in the same unit, epochs or steps.
        config: the settings.
        warmup: length of the warmup.
        total: length of the run, warmup included.
    """
    if done < warmup:
        return config.lr * done / warmup
    progress = (done - warmup) / (total - warmup) if total > warmup else 1.0
    schedules = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
    }
    return config.min_lr + (config.lr - config.min_lr) * schedules[config.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group to `rate` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

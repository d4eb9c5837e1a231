"""Which parameters are trained, in which groups of the optimizer, and at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from unitoken.common.errors import ConfigError
from unitoken.train.config import OptimizerConfig

# SigLIP's patch and position embeddings stay frozen, as in the reference, unless they are named explicitly.
FROZEN = "vit.embeddings"


def matches(entry: str, parameter: str) -> bool:
    """Return whether an entry of a setting names a parameter or a module that holds it."""
    return parameter == entry or parameter.startswith(f"{entry}.")


def freeze(model: nn.Module, trainable: Sequence[str]) -> list[str]:
    """Freeze all parameters but those that `trainable` names.

    Args:
        model: the model.
        trainable: names of parameters or modules. `vit` trains the tower without `vit.embeddings`, which only
            entries that begin with `vit.embeddings` train.

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


def build_optimizer(model: nn.Module, config: OptimizerConfig, compat: bool = False) -> torch.optim.AdamW:
    """Build AdamW with a group for each entry of `lr_scales` and one for the rest.

    Norms and biases are in groups of their own without weight decay, as decay would pull their gains to zero.
    Each group carries its `name` and `lr_scale`.

    Not Composer's DecoupledAdamW: it does not multiply the decay by the learning rate, so that 0.1 would
    shrink the weights by a tenth each step.

    Args:
        model: the model; its frozen parameters are left out.
        config: the settings. Entries of `lr_scales` name parameters as `trainable` does; the longest match
            wins.
        compat: decay all parameters, as in the reference.

    Raises:
        ConfigError: an entry of `lr_scales` that names no trained parameter.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matching = [entry for entry in config.lr_scales if matches(entry, name)]
            decays = compat or not ("norm" in name or name.endswith("bias"))
            groups.setdefault((max(matching, key=len, default="rest"), decays), []).append(parameter)
    unused = set(config.lr_scales) - {name for name, _ in groups}
    if unused:
        raise ConfigError(f"optimizer.lr_scales: '{sorted(unused)[0]}' names no parameter that is trained")
    order = [*config.lr_scales, "rest"]
    return torch.optim.AdamW(
        [
            {
                "params": groups[name, decays],
                "name": name,
                "lr_scale": config.lr_scales.get(name, 1.0),
                "lr": 0.0,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for name, decays in sorted(groups, key=lambda key: (order.index(key[0]), not key[1]))
        ],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        # Otherwise torch takes sharded parameters one by one: for 7B a fifth of a second a step in which GPUs
        # wait.
        foreach=True,
    )


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

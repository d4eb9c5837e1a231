"""What is trained, at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from unitoken.streaming_data.config import ConfigError
from unitoken.train.config import OptimizerConfig

# SigLIP's patch and position embeddings stay as they are, as in the reference, unless they are named explicitly.
FROZEN = "vit.embeddings"


def freeze(model: nn.Module, trainable: Sequence[str]) -> list[str]:
    """Leave gradients to the parameters that `trainable` names, by whole name or by module; gives back their names.

    `vit` trains the tower without `vit.embeddings`; only an entry that begins with `vit.embeddings` trains those.

    Raises:
        ConfigError: an entry that names nothing, or only what stays frozen.
    """
    unused = set(trainable)
    chosen = []
    for name, parameter in model.named_parameters():
        matching = {entry for entry in trainable if name == entry or name.startswith(f"{entry}.")}
        if name.startswith(f"{FROZEN}."):
            matching = {entry for entry in matching if entry.startswith(FROZEN)}
        unused -= matching
        parameter.requires_grad_(bool(matching))
        if matching:
            chosen.append(name)
    if unused:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(f"trainable: '{sorted(unused)[0]}' names no parameter of the model; its parts are {parts}")
    return chosen


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with two groups, the vision tower and the rest; each carries its `lr_scale`.

    Not Composer's DecoupledAdamW: that one does not multiply the decay by the learning rate, and 0.1 would shrink
    the weights by a tenth a step.
    """
    vit: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (vit if "vit" in name.split(".") else rest).append(parameter)
    groups = [
        {"params": parameters, "lr_scale": scale, "lr": 0.0}
        for parameters, scale in ((vit, config.vit_lr_scale), (rest, 1.0))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def learning_rate(epoch: float, config: OptimizerConfig, warmup_epochs: float, epochs: float) -> float:
    """The learning rate at a fractional epoch: linear from 0, then half a cosine down to `min_lr`. The first step has 0."""
    if epoch < warmup_epochs:
        return config.lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs) if epochs > warmup_epochs else 1.0
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

"""What is trained, at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from unitoken.common.errors import ConfigError
from unitoken.train.config import OptimizerConfig

# SigLIP's patch and position embeddings stay as they are, as in the reference, unless they are named explicitly.
FROZEN = "vit.embeddings"


def names(entry: str, parameter: str) -> bool:
    """Whether a setting's entry means this parameter: by its whole name, or by a module it is in."""
    return parameter == entry or parameter.startswith(f"{entry}.")


def freeze(model: nn.Module, trainable: Sequence[str]) -> list[str]:
    """Leave gradients to the parameters that `trainable` names, by whole name or by module; gives back their names.

    `vit` trains the tower without `vit.embeddings`; only an entry that begins with `vit.embeddings` trains those.

    Raises:
        ConfigError: an entry that names nothing, or only what stays frozen.
    """
    unused = set(trainable)
    chosen = []
    for name, parameter in model.named_parameters():
        matching = {entry for entry in trainable if names(entry, name)}
        if name.startswith(f"{FROZEN}."):
            matching = {entry for entry in matching if entry.startswith(FROZEN)}
        unused -= matching
        parameter.requires_grad_(bool(matching))
        if matching:
            chosen.append(name)
    if unused:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(
            f"trainable: '{sorted(unused)[0]}' names no parameter of the model; its parts are {parts}"
        )
    return chosen


def build_optimizer(model: nn.Module, config: OptimizerConfig, compat: bool = False) -> torch.optim.AdamW:
    """AdamW with a group for each entry of `lr_scales` and one for the rest; each carries its `name` and `lr_scale`.

    An entry names parameters as `trainable` does; the longest that matches wins. Norms and biases are in groups of their
    own without weight decay: pulled to zero, a gain is no longer a gain. With `compat` everything decays, as in the reference.

    Not Composer's DecoupledAdamW: that one does not multiply the decay by the learning rate, and 0.1 would shrink
    the weights by a tenth a step.

    Raises:
        ConfigError: an entry of `lr_scales` that names nothing that is trained.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matching = [entry for entry in config.lr_scales if names(entry, name)]
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
        foreach=True,  # torch takes shards one by one otherwise: for 7B a fifth of a second a step in which GPUs wait
    )


def learning_rate(done: float, config: OptimizerConfig, warmup: float, total: float) -> float:
    """The learning rate when `done` of `total` is done: linear from 0 over `warmup`, then as `schedule` says down to `min_lr`.

    The three are in one unit, epochs or steps. The first step has 0.
    """
    if done < warmup:
        return config.lr * done / warmup
    progress = (done - warmup) / (total - warmup) if total > warmup else 1.0
    left = {"cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "linear": 1.0 - progress, "constant": 1.0}[
        config.schedule
    ]
    return config.min_lr + (config.lr - config.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

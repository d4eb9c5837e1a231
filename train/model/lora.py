"""Low-rank adapters beside frozen linear layers of the decoder (LoRA, arXiv 2106.09685).

    y = W x + alpha / rank * B A x        A (rank, in), B (out, rank)

B is zero at first, so an adapted model begins as the model that it adapts. The parameters `lora_a` and
`lora_b` are inside the layer, whose own have the names that they have without an adapter. All have one data
type, as FSDP2 needs it of a sharding unit. Checkpoints of a run hold both; everything else that reads them
(`init_from`, `generate`, `export`) gets W + alpha / rank * B A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitoken.train.config import LoraConfig


class AdaptedLinear(nn.Linear):
    """A linear layer (..., in) -> (..., out) with an adapter.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        bias: whether the layer has a bias.
        rank: of the adapter.
        scale: factor of the adapter's outputs.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rank: int, scale: float) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, states: Tensor) -> Tensor:
        """Apply layer and adapter."""
        low = F.linear(states, self.lora_a)
        return super().forward(states) + self.scale * F.linear(low, self.lora_b)


def add_adapters(layers: nn.Module, config: LoraConfig | None) -> None:
    """Replace the linear layers that `config.targets` names by adapted ones, on the `meta` device.

    Args:
        layers: the decoder's layers, on the `meta` device.
        config: rank, scale and targets; None adds none.
    """
    if config is None:
        return
    for parent in list(layers.modules()):
        for name, layer in list(parent.named_children()):
            if name in config.targets and isinstance(layer, nn.Linear):
                with torch.device("meta"):
                    adapted = AdaptedLinear(
                        layer.in_features,
                        layer.out_features,
                        bias=layer.bias is not None,
                        rank=config.rank,
                        scale=config.scale,
                    )
                setattr(parent, name, adapted)


def draw_adapter(shape: tuple[int, ...], name: str, generator: torch.Generator) -> Tensor:
    """Return the first values of a parameter of an adapter: B is zero, and A as torch draws linear layers.

    Args:
        shape: of the parameter.
        name: of the parameter.
        generator: of the random draws.
    """
    if name.endswith("lora_b"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged_weight(name: str, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """Return a copy of a parameter, with its adapter added if there is one.

    Args:
        name: of the parameter.
        tensors: of a model with adapters, by name.
        scale: factor of the adapters' outputs.
    """
    merged = tensors[name].clone()
    layer = name.removesuffix("weight")
    if f"{layer}lora_a" in tensors:
        merged += scale * (tensors[f"{layer}lora_b"] @ tensors[f"{layer}lora_a"])
    return merged

"""Activation checkpointing: what the backward pass recomputes instead of keeping it.

It happens inside the layers' forward, not in wrappers around them. So under FSDP2 the recomputation stays
within the sharding unit: parameters are gathered once, inputs are already cast, and parameter names do not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal, Protocol, cast

import torch
import torch.fx.traceback
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What the backward pass recomputes of a layer: nothing, everything, or all but matrix products and attention.
RecomputeMode = Literal["none", "full", "selective"]


class RecomputableLayer(Protocol):
    """A layer that reads `recompute` in its forward."""

    recompute: RecomputeMode


def set_recompute(layers: Iterable[RecomputableLayer], setting: RecomputeMode | int) -> None:
    """Apply the setting `activation_checkpointing` to a stack of layers.

    Args:
        layers: the stack, in order.
        setting: a mode for all layers, or a number k: every k-th layer is recomputed in full, from the first
            on.
    """
    if setting == "selective":
        _add_flex_attention_rule()
    for number, layer in enumerate(layers):
        if isinstance(setting, str):
            layer.recompute = setting
        else:
            layer.recompute = "full" if number % setting == 0 else "none"


def run_recomputable(forward: Callable[..., Tensor], mode: RecomputeMode, *inputs: Any) -> Tensor:
    """Return `forward(*inputs)`, keeping the activations that `mode` says.

    The recomputation draws the same random numbers as the forward pass.
    """
    if mode == "none":
        return forward(*inputs)
    if mode == "full":
        return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False))
    contexts = partial(create_selective_checkpoint_contexts, _selective_policy)
    return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts))


def _selective_policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001 - torch's signature
    if operation in _saved_operations():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _add_flex_attention_rule() -> None:
    """Teach torch 2.7's selective checkpointing flex attention, which newer versions know.

    Flex attention is a higher-order operation. The forward pass saves its outputs,
    and the recomputation takes them in the same order.
    """
    from torch.nn.attention import flex_attention  # noqa: F401 - so that its operation exists; takes three seconds

    operation = torch.ops.higher_order.flex_attention
    forward_mode = torch_checkpoint._CachingTorchDispatchMode
    recompute_mode = torch_checkpoint._CachedTorchDispatchMode
    if forward_mode in operation.python_key_table:
        return

    @operation.py_impl(forward_mode)  # type: ignore[untyped-decorator]
    def save(mode: Any, *args: Any, **kwargs: Any) -> Any:
        torch.fx.traceback.current_meta["recompute"] = CheckpointPolicy.MUST_SAVE
        out = operation(*args, **kwargs)
        versions = tree_map(lambda value: torch_checkpoint._VersionWrapper(value.detach()), out)  # type: ignore[no-untyped-call]
        mode.storage[operation].append(versions)
        return out

    @operation.py_impl(recompute_mode)  # type: ignore[untyped-decorator]
    def restore(mode: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - torch's signature
        versions = mode.storage[operation].pop(0)
        return tree_map(lambda value: value.get_val(mode.allow_cache_entry_mutation), versions)


@cache
def _saved_operations() -> frozenset[Any]:
    """Operations whose outputs `selective` keeps: matrix products and attention take most of the time."""
    aten = torch.ops.aten
    return frozenset({
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    })  # fmt: skip

"""What the backward pass computes again instead of keeping it: activation checkpointing.

It is done inside the layers' forward, not by wrappers around them, so that under FSDP2 the recomputation happens within the
unit of sharding: parameters are gathered once, inputs are already cast, and parameter names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal, Protocol, cast

import torch
import torch.fx.traceback
from torch import Tensor
from torch.utils import checkpoint as checkpoints
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "full", "selective"]


class Recomputed(Protocol):
    recompute: Mode


def set_recompute(layers: Iterable[Recomputed], setting: Mode | int) -> None:
    """`activation_checkpointing` of the settings, for a stack of layers; a number k: every k-th of them, from the first on."""
    if setting == "selective":
        _let_flex_be_kept()
    for number, layer in enumerate(layers):
        layer.recompute = setting if isinstance(setting, str) else "none" if number % setting else "full"


def run_layers(forward: Callable[..., Tensor], mode: Mode, *inputs: Any) -> Tensor:
    """`forward(*inputs)`, its activations kept as `mode` says. Random numbers are drawn the same the second time."""
    if mode == "none":
        return forward(*inputs)
    if mode == "full":
        return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False))
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return cast(Tensor, checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts))


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001 - torch's signature
    return CheckpointPolicy.MUST_SAVE if operation in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _let_flex_be_kept() -> None:
    """Torch 2.7's selective checkpointing does not know flex attention, a higher-order operation; newer ones do."""
    from torch.nn.attention import flex_attention  # noqa: F401 - so that its operation exists; three seconds

    flex, caching, cached = (
        torch.ops.higher_order.flex_attention,
        checkpoints._CachingTorchDispatchMode,
        checkpoints._CachedTorchDispatchMode,
    )
    if caching in flex.python_key_table:
        return

    @flex.py_impl(caching)  # type: ignore[untyped-decorator]
    def keep(mode: Any, *args: Any, **kwargs: Any) -> Any:
        torch.fx.traceback.current_meta["recompute"] = CheckpointPolicy.MUST_SAVE
        out = flex(*args, **kwargs)
        mode.storage[flex].append(tree_map(lambda value: checkpoints._VersionWrapper(value.detach()), out))  # type: ignore[no-untyped-call]
        return out

    @flex.py_impl(cached)  # type: ignore[untyped-decorator]
    def take(mode: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - torch's signature
        return tree_map(
            lambda value: value.get_val(mode.allow_cache_entry_mutation), mode.storage[flex].pop(0)
        )


@cache
def _kept() -> frozenset[Any]:
    """Operations whose outputs are kept: what takes most of the time, matrix products and attention."""
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

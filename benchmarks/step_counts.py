"""Count what a training step does, without a GPU: on fake tensors, and by compiling a layer.

Numbers a layer are differences between models of 4 and 2 layers, so that the whole 7B model need not be run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.simulated_step import simulated_step
from unitoken.train.accounting.flops import step_flops
from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig
from unitoken.train.model import unitoken
from unitoken.train.model.activation_checkpointing import RecomputeMode
from unitoken.train.model.decoder import DecoderLayer, compute_rotary
from unitoken.train.optim import freeze

aten = torch.ops.aten
ATTENTION = "scaled_dot_product"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
TAGS_OF_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def waits_for_device(operation: Any, args: Any) -> bool:
    """Return whether the CPU then needs a value, or a shape, that the GPU has computed."""
    if operation.overloadpacket in (aten.index, aten.index_put):
        # An index waits only if it is a mask, whose true values have to be counted.
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool(TAGS_OF_WAITS & {*operation.tags})


def starts_kernel(operation: Any) -> bool:
    """Return whether an operation works on a tensor's memory; views and allocations do not."""
    is_view = operation.is_view or operation is aten._unsafe_view.default
    return not is_view and "empty" not in operation.overloadpacket.__name__


class StepCounts(TorchDispatchMode):
    """Counts kernels, FLOPs of products, bytes of everything else, and waits for the GPU.

    Views and allocations start no kernel. The bytes of a kernel are those of its inputs and outputs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.elementwise_bytes = self.waits = 0
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local tensors are dispatched here in turn
        self.waits += waits_for_device(func, args)
        if func is aten.nonzero.default:  # fake tensors have no values: take all as nonzero
            result = args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not starts_kernel(func) or func.namespace not in ("aten", "prims"):
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        self.kernels += 1
        if ATTENTION in name:
            self.flops += _attention_flops(name, args)
        elif name in PRODUCTS:
            self.flops += _product_flops(name, args, result)
        else:
            self.elementwise_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def _product_flops(name: str, args: Any, result: Any) -> float:
    """Return the FLOPs of a product of matrices; 2 for each multiplication and addition."""
    if name == "convolution":
        return float(2 * result.numel() * args[1][0].numel())
    if name == "convolution_backward":  # the gradients that the last argument asks for, without the bias's
        return float(2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2]))
    left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
    return float(2 * left.numel() * right.shape[-1])


def _attention_flops(name: str, args: Any) -> float:
    """Return the FLOPs of attention's two products; the backward pass counts twice."""
    query, key = args[1:3] if "backward" in name else args[0:2]
    return float((8 if "backward" in name else 4) * query.numel() * key.shape[-2])


@dataclass(frozen=True)
class StageCounts:
    """What a rank does in a step of a stage."""

    flops: float  # of a microbatch
    recomputed_flops_share: float  # of `flops`, what the model would not need
    eager_elementwise_kb_token_layer: float
    compiled_elementwise_kb_token_layer: float
    kernels_layer: float  # of the forward and backward pass, not compiled
    waits_microbatch: int
    waits_optimizer: int


def count_stage(
    config: StageConfig, decoder: DecoderConfig, vision: VisionTowerConfig, *, ranks: int, views: int
) -> StageCounts:
    """Count a microbatch and an update of one of `ranks` GPUs.

    Args:
        config: the stage.
        decoder: sizes of the decoder.
        vision: sizes of the vision tower.
        ranks: number of GPUs.
        views: views (images or tiles) of a microbatch.
    """

    def count(layers: int) -> tuple[StepCounts, StepCounts, list[str]]:
        sizes = decoder.model_copy(update={"num_hidden_layers": layers})
        microbatch, update = StepCounts(), StepCounts()
        # Without a mask, as with flex: that of sdpa would be copied in each layer.
        with (
            patch.object(unitoken, "document_mask", lambda *_: None),
            simulated_step(config, sizes, vision, ranks=ranks, views=views) as step,
        ):
            trained = freeze(step.model, config.trainable)
            with microbatch:
                step.run_microbatch()
            with update:
                step.update_weights()
        return microbatch, update, trained

    (two, _, _), (four, update, trained) = count(2), count(4)
    tokens = config.microbatch_packs * config.data.packed_length

    def all_layers(of: Callable[[StepCounts], float]) -> float:
        each = (of(four) - of(two)) / 2
        return of(two) + (decoder.num_hidden_layers - 2) * each

    flops = all_layers(lambda counts: counts.flops)
    needed = step_flops(decoder, vision, _of_all_layers(trained, decoder.num_hidden_layers)).total(
        tokens, tokens * config.data.packed_length, views, tokens - config.microbatch_packs
    )
    return StageCounts(
        flops=flops,
        recomputed_flops_share=1 - needed / flops,
        eager_elementwise_kb_token_layer=(four.elementwise_bytes - two.elementwise_bytes) / 2 / tokens / 1e3,
        compiled_elementwise_kb_token_layer=compiled_elementwise_bytes(config, decoder) / 1e3,
        kernels_layer=(four.kernels - two.kernels) / 2,
        waits_microbatch=four.waits,
        waits_optimizer=update.waits,
    )


def _of_all_layers(trained: list[str], layers: int) -> list[str]:
    """Return the names of trained parameters of a model of more layers than two."""
    first = [name for name in trained if name.startswith("model.layers.0.")]
    others = [name for name in trained if not name.startswith("model.layers.")]
    return others + [name.replace(".0.", f".{layer}.", 1) for layer in range(layers) for name in first]


def compiled_elementwise_bytes(config: StageConfig, decoder: DecoderConfig) -> float:
    """Return the bytes a token that a compiled layer's fused kernels read and write, forward and backward."""
    setting = config.recompute
    recompute: RecomputeMode = setting if isinstance(setting, str) else "full"
    trains = any(name.split(".")[0] == "model" for name in config.trainable)
    width = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return _compile_and_count(decoder, recompute, trains, width, config.model.dropout)


@functools.cache  # with AnyRes layers are the same
def _compile_and_count(
    decoder: DecoderConfig,
    recompute: RecomputeMode,
    trains: bool,
    width: torch.dtype,
    dropout: float,
    tokens: int = 32,
) -> float:
    """Compile a layer for the CPU, with inductor's own count of bytes; products and attention are left out.

    Its parameters are bfloat16, as FSDP2 gathers them.
    """
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    counted: list[float] = []
    original = GraphLowering.count_bytes

    def count_bytes(graph: GraphLowering) -> Any:
        result = original(graph)
        counted.extend(
            4 * numbers for node, numbers in result[1] if not isinstance(node, ExternKernelSchedulerNode)
        )
        return result

    torch._dynamo.reset()
    layer = DecoderLayer(decoder, dropout).to(width).train().requires_grad_(trains)
    layer.recompute = recompute
    layer.compile()
    hidden = torch.randn(1, tokens, decoder.hidden_size, dtype=width, requires_grad=True)
    cos, sin = compute_rotary(torch.arange(tokens)[None], decoder.head_size, decoder.rope_theta)
    autocast = torch.autocast("cpu", torch.bfloat16) if width is torch.bfloat16 else nullcontext()
    # Inductor does not count graphs that it finds in its cache.
    with (
        patch.object(GraphLowering, "count_bytes", count_bytes),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        with autocast:
            out = layer(hidden, cos, sin, None)
        out.sum().backward()
    if len(counted) < 2:
        raise RuntimeError("inductor compiled nothing")
    return sum(counted) / tokens

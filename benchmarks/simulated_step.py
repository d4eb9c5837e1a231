"""Simulate a training step at its real size without its memory.

The tensors are fake tensors on a CPU, sharded by FSDP2 over a fake process group.

It counts the most bytes of all storages alive at once in the forward and backward pass of a run's second
step. Attention is sdpa's, whose mask becomes numbers in each layer; all tokens are supervised. Where a CPU
keeps other tensors than a GPU it is made to keep the same: autocast computes LayerNorm in float32, and
dropout's mask has a byte an element.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed._tools.fake_collectives  # the collectives that FSDP2 calls, for fake tensors
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.lora import add_adapters
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.optim import build_optimizer, freeze, set_learning_rate

LUMINA_7B = DecoderConfig(
    vocab_size=65536, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
SIGLIP_SO400M = VisionTowerConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes alive of all storages that operations return and FSDP2 resizes, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self._change, storage._cdata, None)
        self._change(storage._cdata, storage.nbytes())

    def _change(self, key: int, size: int | None) -> None:
        self.now += (size or 0) - self.sizes.pop(key, 0)
        if size is not None:
            self.sizes[key] = size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local tensors are dispatched here in turn
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result

    def __enter__(self) -> "PeakBytes":
        self._resize, peak = UntypedStorage.resize_, self

        def resize_(storage: UntypedStorage, size: int) -> None:
            peak._resize(storage, size)
            if storage._cdata in peak.sizes:
                peak._change(storage._cdata, size)

        UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


@dataclass
class SimulatedStep:
    """A step of one of many ranks on fake tensors."""

    config: StageConfig
    model: UniToken
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]

    def run_microbatch(self) -> None:
        """Run the forward and the backward pass of a microbatch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.model(self.batch).total
        loss.backward()

    def update_weights(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def simulated_step(
    config: StageConfig,
    decoder: DecoderConfig,
    vision: VisionTowerConfig,
    *,
    ranks: int,
    views: int,
) -> Iterator[SimulatedStep]:
    """Yield a step of one of `ranks` GPUs; its optimizer has no moments yet.

    A microbatch has `config.microbatch` packs and `views` views (images or tiles) for the tower.
    """
    with ExitStack() as stack:
        stack.enter_context(_as_on_a_gpu())
        mesh = None
        if ranks > 1:
            distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
            stack.callback(distributed.destroy_process_group)
            mesh = init_device_mesh("cpu", (ranks,))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = build_model(decoder, vision, config.model, config.recompute)
        add_adapters(model.model.layers, config.model.lora)
        freeze(model, config.trainable)
        for module in model.train().modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(
                    name, nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                )
        if mesh is not None:
            _shard(model, config, mesh)
        optimizer = build_optimizer(model, config.optimizer)
        set_learning_rate(optimizer, 1e-5)
        yield SimulatedStep(config, model, optimizer, _batch(config, vision, views))


def peak_bytes(
    config: StageConfig,
    decoder: DecoderConfig,
    vision: VisionTowerConfig,
    *,
    ranks: int,
    views: int,
    microbatches: int = 1,
) -> int:
    """Return the peak bytes of one of `ranks` GPUs; see `simulated_step`."""
    with simulated_step(config, decoder, vision, ranks=ranks, views=views) as step:
        peak = PeakBytes()
        for tensor in (*step.model.parameters(), *step.batch.values()):
            peak.count(tensor)
        with peak:
            for _ in range(2):  # the second has Adam's moments
                peak.most = 0
                for _ in range(microbatches):
                    step.run_microbatch()
                most = peak.most
                step.update_weights()
        return most


def _shard(model: UniToken, config: StageConfig, mesh: DeviceMesh) -> None:
    """Shard as Composer does with `fsdp_wrap_fn` of train/distributed/composer_trainer.py."""
    reduced = torch.bfloat16 if config.fsdp.reduce == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
    layers = [*model.model.layers, *([model.vit] if model.vision else [])]
    for module in layers:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=config.fsdp.reshard)
    if not model.is_tied:
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(model.lm_head, "loss")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=config.fsdp.reshard)


def _batch(config: StageConfig, vision: VisionTowerConfig, views: int) -> dict[str, Tensor]:
    packs, length = config.microbatch_packs, config.data.packed_length
    tokens = torch.zeros(packs, length, dtype=torch.int64)
    features = torch.zeros(views * vision.features, dtype=torch.int64)
    return {
        "input_ids": tokens,
        "labels": tokens.clone(),
        "target_rows": torch.zeros(packs * (length - 1), dtype=torch.int64),
        "target_columns": torch.ones(packs * (length - 1), dtype=torch.int64),
        "position_ids": tokens.clone(),
        "document_ids": tokens.int(),
        "pixel_values": torch.zeros(views, 3, vision.image_size, vision.image_size, dtype=torch.uint8),
        "view_rows": torch.zeros(views, dtype=torch.int64),
        "feature_rows": features,
        "feature_columns": features,
        "feature_views": features,
        "feature_patches": features,
    }


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Make LayerNorm under autocast and dropout keep the tensors that they keep on a GPU."""
    plain = F.layer_norm

    def layer_norm(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return plain(*args, **kwargs)
        args, kwargs = tree_map(
            lambda value: value.float() if isinstance(value, Tensor) else value, (args, kwargs)
        )
        return plain(*args, **kwargs)

    def dropout(states: Tensor, p: float, training: bool) -> Tensor:
        return torch.native_dropout(states, p, training)[0]

    with patch.object(F, "layer_norm", layer_norm), patch.object(F, "dropout", dropout):
        yield
